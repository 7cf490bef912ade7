"""Reads what trackers stored; serves MLflow on loopback."""

import json
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runs import kill
from s3 import free_port


@contextmanager
def mlflow_server(folder: Path):
    """A real ``mlflow server`` over an empty store; its address."""
    port = free_port()
    store = ['--backend-store-uri', f'sqlite:///{folder}/mlflow.db', '--artifacts-destination', f'{folder}/artifacts']
    command = [str(Path(sys.executable).parent / 'mlflow'), 'server', *store, '--port', str(port), '--workers', '1']
    with open(folder / 'server.log', 'w') as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_healthy(f'http://127.0.0.1:{port}', process, folder / 'server.log')
        yield f'127.0.0.1:{port}'
    finally:
        kill(process)  # its workers too


def wait_until_healthy(address: str, process: subprocess.Popen, log: Path, timeout: float = 180) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f'{address}/health', timeout=5):
                return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.2)
    raise RuntimeError(log.read_text()[-3000:])


def ask(address: str, path: str, **body: Any) -> dict[str, Any]:
    """MLflow's REST API: POST where there is a body, else GET."""
    data = json.dumps(body).encode() if body else None
    headers = {'Content-Type': 'application/json'}
    request = urllib.request.Request(f'http://{address}/api/2.0/mlflow/{path}', data, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def read_wandb(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Config, and history by step, of the one offline run below a folder."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (path,) = folder.glob('wandb/offline-run-*/run-*.wandb')
    store, config, history = DataStore(), {}, {}
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof('record_type')
        updates = {'run': record.run.config.update, 'config': record.config.update}.get(kind or '', ())
        for item in updates:
            config['.'.join([item.key, *item.nested_key][not item.key :])] = json.loads(item.value_json)
        if kind == 'history':
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            history[row['_step']] = row
    return config, history


def read_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars below a folder by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {'scalars': 0}).Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()['scalars']}
