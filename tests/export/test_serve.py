"""The logged model behind MLflow's own server."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import kill
from s3 import free_port
from test_write import ROWS
from tiny import tiny_classifier, tiny_tokenizer
from trackers import wait_until_healthy

from dhrd_plugin import load_classifier
from dhrd_plugin.export.mlflow import MlflowTarget
from dhrd_plugin.export.write import write_slim

TEXTS = [row['input_text'] for row in ROWS]


def log_model(folder, store) -> Path:
    """The logged model's folder."""
    mlflow = pytest.importorskip('mlflow')
    mlflow.set_tracking_uri(store.as_uri())
    with mlflow.start_run() as run:
        logger: Any = SimpleNamespace(_run_id=run.info.run_id)
        MlflowTarget(logger).upload(folder, str)
    (path,) = store.rglob('MLmodel')
    return path.parent


@pytest.mark.parametrize('head, several', [('linear', False), ('mlp', True)])
def test_mlflow_answers_with_the_labels(tmp_path, head, several, monkeypatch):
    """By its own server; a stock classifier, which has no code of ours, in this process."""
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    model = tiny_classifier(tiny_tokenizer(bos=True, apart=True), several, head=head)
    slim = write_slim(model.get_metadata(), model.network.state_dict(), tmp_path / 'slim')
    logged = log_model(slim, tmp_path / 'store')
    rows = served(logged, tmp_path) if head == 'mlp' else mlflow_rows(logged)
    classifier = load_classifier(slim)
    assert [row['label'] for row in rows] == classifier.predict(TEXTS)
    for row, expected in zip(rows, classifier.predict_proba(TEXTS).tolist(), strict=True):
        assert list(row['probabilities'].values()) == pytest.approx(expected, abs=1e-4)
    assert any(row['label'] != rows[0]['label'] for row in rows)


def mlflow_rows(logged) -> list[dict[str, Any]]:
    import mlflow

    return mlflow.pyfunc.load_model(str(logged)).predict(TEXTS).to_dict('records')


def served(logged, tmp_path) -> list[dict[str, Any]]:
    """What ``mlflow models serve`` answers."""
    port, programs = free_port(), Path(sys.executable).parent
    options = ['--env-manager', 'local', '--host', '127.0.0.1', '--port', str(port), '--workers', '1']
    command = [str(programs / 'mlflow'), 'models', 'serve', '--model-uri', str(logged), *options]
    path = f'{programs}{os.pathsep}{os.environ["PATH"]}'  # where mlflow finds its server
    env = {**os.environ, 'PATH': path, 'OMP_NUM_THREADS': '1', 'MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT': '300'}
    with open(tmp_path / 'server.log', 'w') as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env, cwd=tmp_path)
    address = f'http://127.0.0.1:{port}'
    try:
        wait_until_healthy(address, process, tmp_path / 'server.log')
        body, headers = json.dumps({'inputs': TEXTS}).encode(), {'Content-Type': 'application/json'}
        with urllib.request.urlopen(
            urllib.request.Request(f'{address}/invocations', body, headers), timeout=120
        ) as got:
            return json.load(got)['predictions']
    finally:
        kill(process)  # its workers too
