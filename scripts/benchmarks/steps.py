"""Ways to make the same training step on the same weights: through Composer, in a bare loop, and by others.

The optimizer's learning rate is 0: it does all its work, and every way starts from the same weights.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from composer import DataSpec
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import two_pass
from benchmarks.fits import StepClock, make_trainer
from dhrd_plugin.data.collator import Encoded, TripletCollator
from dhrd_plugin.data.data_spec import triplet_data_spec
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.errors import UserError
from dhrd_plugin.losses import IGNORE_INDEX, combine_losses
from dhrd_plugin.models import padding_free as unpadded
from dhrd_plugin.models.composer_model import RETURN_REASONING_LOSS, ComposerDualHeadClassifier
from dhrd_plugin.models.network import DualHeadNetwork

BATCH = 8

Rows = Sequence[Mapping[str, Any]]  # triplets


@dataclass
class Bench:
    """What all ways share.

    Attributes:
        network: ours; all ways use its weights.
        optimizer: of these weights.
        tokenizer: the backbone's.
        task: of the rows.
    """

    network: DualHeadNetwork
    optimizer: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerBase
    task: Task

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.network.lm_head.weight.device

    def precision(self) -> torch.autocast:
        """bf16 on a GPU, else fp32: Composer's defaults."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == 'cuda')

    def encode(self, rows: Rows, reasoning: bool = True) -> list[Encoded]:
        """Encode rows as ours does."""
        return TripletCollator(self.tokenizer, self.task.label_names, reasoning=reasoning).encode(rows)  # pyright: ignore

    def classes(self, rows: Rows) -> list[int]:
        """The class indices of rows."""
        return [self.task.label_names.index(row['label']) for row in rows]

    def data(self, rows: Rows, reasoning: bool) -> DataSpec:
        """Load the rows in order, collated and cut into microbatches as in training."""
        collate = TripletCollator(self.tokenizer, self.task.label_names, reasoning=reasoning)
        return triplet_data_spec(DataLoader(rows, BATCH, collate_fn=collate), by_length=True)  # pyright: ignore


def make_bench(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> Bench:
    """Make a bench on a backbone; its head is randomly initialised, and linear, as the stock class has it."""
    torch.manual_seed(0)
    network = DualHeadNetwork(lm, len(task.label_names), 'linear')
    network.train().to('cuda' if torch.cuda.is_available() else 'cpu')
    return Bench(network, torch.optim.AdamW(network.parameters(), lr=0.0), tokenizer, task)


def twin(module: Any) -> Any:
    """Copy a module with its config, but share the weights and their gradients."""
    return copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})


def batches(rows: Sequence[Any], size: int = BATCH) -> Iterator[Sequence[Any]]:
    """Cut rows into batches, in order."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _classifier(bench: Bench, padding_free: bool) -> ComposerDualHeadClassifier:
    network = twin(bench.network)
    network.padding_free = padding_free
    if padding_free:
        network.longest_unpadded = unpadded.use_padding_free(network.causal_lm)
    return ComposerDualHeadClassifier(network, bench.tokenizer, bench.task.label_names)


class ThroughComposer:
    """Train for an epoch by Composer's Trainer at each call; without ``reasoning`` the pooled baseline.

    Attributes:
        clock: times every step.
        seconds: of each call, spent in its steps.
        around: seconds of each call spent besides, on what begins and ends a fit and an epoch.
    """

    def __init__(self, bench: Bench, rows: Rows, microbatch: int, padding_free: bool = False, reasoning: bool = True):
        self.clock = StepClock()
        self.seconds: list[float] = []
        self.around: list[float] = []
        self.trainer = make_trainer(
            _classifier(bench, padding_free),
            bench.data(rows, reasoning),
            bench.optimizer,
            min(microbatch, len(rows)),
            [self.clock],
            None if reasoning else [],
        )

    def __call__(self) -> float:
        """Train for an epoch, and return the last step's loss."""
        before, start = len(self.clock.steps), time.perf_counter()
        self.trainer.fit(duration='1ep')
        self.seconds.append(sum(self.clock.steps[before:]))
        self.around.append(time.perf_counter() - start - self.seconds[-1])
        return self.trainer.state.total_loss_dict['loss/train/total']


def bare_loop(bench: Bench, rows: Rows, microbatch: int, padding_free: bool = False) -> Callable[[], float]:
    """Make the same without Composer's loop: a function that trains for an epoch and returns the last step's loss."""
    model, data = _classifier(bench, padding_free), bench.data(rows, reasoning=True)

    def loss_of(part: dict[str, Tensor]) -> Tensor:
        output = model({**part, RETURN_REASONING_LOSS: True})
        return combine_losses(model.loss(output, part), output.reasoning_loss)  # pyright: ignore

    def epoch() -> float:
        return [
            step(bench, data.split_batch(batch, microbatch), loss_of)  # pyright: ignore
            for batch in data.dataloader
        ][-1]

    return epoch


def step(bench: Bench, parts: Sequence[dict[str, Tensor]], loss_of: Callable[[dict[str, Tensor]], Tensor]) -> float:
    """Make one step over microbatches, each weighted by its share of the rows.

    Args:
        bench: its weights are stepped.
        parts: the microbatches, each with ``labels``.
        loss_of: the mean loss of a microbatch.

    Returns:
        The loss.
    """
    bench.optimizer.zero_grad()
    count, total = sum(len(part['labels']) for part in parts), torch.zeros((), device=bench.device)
    for part in parts:
        part = {key: _moved(value, bench.device) for key, value in part.items()}
        with bench.precision():
            loss = loss_of(part) * (len(part['labels']) / count)
        loss.backward()
        total += loss.detach()
    bench.optimizer.step()
    return float(total)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value  # where rows lie, the host knows


def two_passes(bench: Bench, rows: Rows, microbatch: int, length: int = two_pass.MAX_LENGTH) -> Callable[[], float]:
    """Make an epoch of the common way; see :mod:`~benchmarks.two_pass`."""
    lm, classifier, pad = twin(bench.network.causal_lm), bench.network.classifier, bench.tokenizer.pad_token_id

    def parts(some: Rows) -> list[dict[str, Tensor]]:
        cut = batches(list(zip(bench.encode(some), bench.classes(some))), microbatch)
        return [two_pass.collate(*zip(*part), pad, length) for part in cut]  # pyright: ignore

    def loss_of(part: dict[str, Tensor]) -> Tensor:
        return two_pass.loss(lm, classifier, part)

    return lambda: [step(bench, parts(some), loss_of) for some in batches(rows)][-1]


def stock(bench: Bench, rows: Rows) -> Callable[[], float]:
    """Make an epoch of the pooled baseline by transformers: inputs alone, padded to the longest of a batch."""
    model = stock_model(bench)

    def collate(some: Rows) -> dict[str, Tensor]:
        encoded = bench.tokenizer([row['input_text'] for row in some], padding=True, return_tensors='pt')
        return {'labels': torch.tensor(bench.classes(some)), **encoded}  # pyright: ignore[reportReturnType]

    def loss_of(part: dict[str, Tensor]) -> Tensor:
        return model(**part, use_cache=False).loss

    return lambda: [step(bench, [collate(some)], loss_of) for some in batches(rows)][-1]


def stock_model(bench: Bench) -> PreTrainedModel:
    """Build ``AutoModelForSequenceClassification`` on the bench's weights."""
    config = copy.deepcopy(bench.network.config)
    config.num_labels = bench.network.num_labels
    with torch.device('meta'):
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation=config._attn_implementation)
    setattr(model, model.base_model_prefix, twin(bench.network.backbone))
    model.score = bench.network.classifier.out_proj
    return model.train()


def floor_by_row(bench: Bench, rows: Rows) -> Callable[[], None]:
    """Make an epoch of what no way can avoid: the backbone on each row's tokens, the LM head where a target follows."""
    lm = twin(bench.network.causal_lm)

    def run(encoded: Sequence[Encoded]) -> None:
        for row in encoded:
            ids, targets = torch.tensor([row.input_ids, row.labels], device=bench.device)
            with bench.precision():
                hidden = lm.base_model(ids[None], use_cache=False)[0][0]
            product(lm.get_output_embeddings(), hidden, targets)

    return _floor(bench, rows, run)


def runs_unpadded(bench: Bench) -> bool:
    """Whether the bench's model can run rows without their padding."""
    try:
        unpadded.use_padding_free(twin(bench.network.causal_lm))
    except UserError:
        return False
    return True


def floor_in_one(bench: Bench, rows: Rows) -> Callable[[], None]:
    """Make the same with the rows of a batch as one sequence, each attending to itself."""
    lm = twin(bench.network.causal_lm)
    unpadded.use_padding_free(lm)

    def run(encoded: Sequence[Encoded]) -> None:
        lengths = torch.tensor([len(row.input_ids) for row in encoded], device=bench.device)
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        flat = [list(chain(*parts)) for parts in zip(*((row.input_ids, row.labels) for row in encoded))]
        ids, targets = torch.tensor(flat, device=bench.device)
        longest = max(len(row.input_ids) for row in encoded)
        positions = torch.cat([torch.arange(len(row.input_ids), device=bench.device) for row in encoded])
        with bench.precision():
            hidden = lm.base_model(
                ids[None],
                attention_mask=offsets.expand(1, 1, longest, -1),
                position_ids=positions[None],
                use_cache=False,
            )[0][0]
        product(lm.get_output_embeddings(), hidden, targets)

    return _floor(bench, rows, run)


def _floor(bench: Bench, rows: Rows, run: Callable[[Sequence[Encoded]], None]) -> Callable[[], None]:
    def epoch() -> None:
        for some in batches(rows):
            bench.optimizer.zero_grad()
            run(bench.encode(some))
            bench.optimizer.step()

    return epoch


def product(head: nn.Linear, hidden: Tensor, targets: Tensor, chunk: int = 256) -> None:
    """Run the LM head where a target follows, and the backward pass; without a loss, the logits are the gradient.

    Args:
        head: its weight's gradient is added to.
        hidden: states ``[T, H]``, through which the backward pass is run.
        targets: ``[T]``, -100 where nothing is supervised.
        chunk: positions whose logits exist at a time. Default: 256.
    """
    dtype = torch.bfloat16 if hidden.is_cuda else hidden.dtype
    states = hidden[(targets != IGNORE_INDEX).nonzero().flatten() - 1].to(dtype)
    with torch.no_grad():
        weight = head.weight.to(dtype)
        grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight)
        buffer = states.new_empty(min(chunk, len(states)), len(weight))
        for start in range(0, len(states), chunk):
            part = states[start : start + chunk]
            logits = torch.mm(part, weight.T, out=buffer[: len(part)])
            torch.mm(logits, weight, out=grad_states[start : start + chunk])
            grad_weight.addmm_(logits.T, part)
    torch.autograd.backward([states, head.weight], [grad_states, grad_weight.to(head.weight.dtype)])
