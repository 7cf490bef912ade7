"""The dual-head network: one decoder-only LM, two heads, one forward pass (arXiv:2509.21487, section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from dhrd_plugin.errors import UserError
from dhrd_plugin.losses import chunked_lm_loss
from dhrd_plugin.models import padding_free as unpadded
from dhrd_plugin.models.extent import Extent, Span
from dhrd_plugin.models.heads import POOLINGS, ClassificationHead, last_hidden_state, last_real_index, pool, upto
from dhrd_plugin.models.probe import check_decoder, check_rope, decoder_of, left_padding, text_lm
from dhrd_plugin.models.verbalizer import begin_as_answers


@dataclass
class DualHeadOutput(ModelOutput):
    """What :class:`DualHeadNetwork` returns.

    Attributes:
        logits: [B, K] class logits.
        reasoning_loss: [B] mean next-token loss of each sequence; only when it was asked for.
    """

    logits: Tensor | None = None
    reasoning_loss: Tensor | None = None


class DualHeadNetwork(nn.Module):
    """A decoder-only LM with a pooled classification head beside its own LM head.

    Args:
        causal_lm: any decoder-only ``AutoModelForCausalLM``; its LM head is the reasoning head. Of a model with
            parts besides its text, the text part.
        num_labels: number of classes, K.
        head: ``'mlp'`` (two layers, the paper) or ``'linear'``. Default: ``'mlp'``.
        pooling: ``'last'`` (last input token, the paper) or ``'mean'`` over the input span. Default: ``'last'``.
        dropout: dropout of the classification head. Default: 0.
        chunk_size: supervised tokens whose vocabulary logits are alive at a time. Default: 256, on a GPU more
            (:func:`~dhrd_plugin.losses.default_chunk_size`).
        padding_free: run the real tokens of a batch as one sequence
            (:func:`~dhrd_plugin.models.padding_free.use_padding_free`). Default: ``False``.
        probe: run a few tokens through the model first; not where it has no weights yet. Default: ``True``.
        norm: a LayerNorm before the first layer of an ``mlp`` head (ours). Default: ``False``.

    Raises:
        UserError: what :mod:`~dhrd_plugin.models.probe` finds of a few tokens: an encoder or encoder-decoder, a
            model whose logits are not plainly ``lm_head(hidden)``; or ``padding_free`` with a model that cannot.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        num_labels: int,
        head: str = 'mlp',
        pooling: str = 'last',
        dropout: float = 0.0,
        chunk_size: int | None = None,
        padding_free: bool = False,
        probe: bool = True,
        norm: bool = False,
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"pooling: found {pooling!r}; expected 'last' or 'mean'")
        causal_lm = text_lm(causal_lm)
        self.pads_left = check_decoder(causal_lm, run=probe)
        self.causal_lm = causal_lm
        self.config = causal_lm.config
        self.pooling = pooling
        self.lora: dict[str, Any] | None = None
        self.chunk_size = chunk_size
        self.padding_free = padding_free
        self.longest_unpadded = unpadded.use_padding_free(causal_lm) if padding_free else None
        # The width of the states, which is not always the config's hidden_size (OPT-350m).
        width = self.lm_head.weight.shape[1]
        self.classifier = ClassificationHead(
            width, num_labels, head, dropout, getattr(self.config, 'initializer_range', 0.02), norm
        )

    @property
    def backbone(self) -> nn.Module:
        """The decoder without its LM head."""
        return decoder_of(self.causal_lm)

    @property
    def lm_head(self) -> nn.Linear:
        """The reasoning head."""
        return self.causal_lm.get_output_embeddings()  # pyright: ignore

    @property
    def num_labels(self) -> int:
        """Number of classes, K."""
        return self.classifier.out_proj.out_features

    def resize_token_embeddings(self, size: int) -> None:
        """Grow the vocabulary, for markers that are added tokens; each new row is the mean of the old ones.

        The mean itself, while transformers samples around it: every rank and every run gets the same.

        Args:
            size: tokens in the vocabulary, V.
        """
        known = len(self.causal_lm.get_input_embeddings().weight)  # pyright: ignore
        self.causal_lm.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            for layer in (self.causal_lm.get_input_embeddings(), self.lm_head):
                layer.weight[known:] = layer.weight[:known].mean(0)  # pyright: ignore

    def begin_as_answers(
        self, tokenizer: PreTrainedTokenizerBase | None, answers: Sequence[str], where: str = 'answers'
    ) -> None:
        """Let a linear head over the last token begin as the LM's own choice among the answers.

        Arguments and errors are those of :func:`~dhrd_plugin.models.verbalizer.begin_as_answers`.
        """
        found = (self.classifier.kind, self.pooling)
        if found != ('linear', 'last'):
            raise UserError(f"{where}: found with head, pooling {found}; expected ('linear', 'last')")
        begin_as_answers(self.classifier.out_proj, self.lm_head, tokenizer, answers, where)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pool_index: Tensor | None = None,
        reasoning_labels: Tensor | None = None,
        return_reasoning_loss: bool = False,
        spans: Sequence[Span] | None = None,
    ) -> DualHeadOutput:
        """Both heads from one pass; only the input span where the reasoning loss is not asked for.

        Args:
            input_ids: [B, S] input, then rationale and answer.
            attention_mask: [B, S], 1 for real tokens.
            pool_index: [B] position of the last *input* token. Default: the last real token, without rationales.
            reasoning_labels: [B, S] token ids aligned with ``input_ids``, -100 where unsupervised.
            return_reasoning_loss: run the rationale and return its loss.
            spans: where each of the B rows lies, as the collator knows it. Default: read from the tensors, for
                which the host waits for a GPU.

        Returns:
            ``logits`` [B, K], and ``reasoning_loss`` [B] where it was asked for.
        """
        if pool_index is None:
            check_pool_index(reasoning_labels)
            pool_index = last_real_index(attention_mask)
        reason = return_reasoning_loss and reasoning_labels is not None
        if not reason:
            attention_mask = attention_mask * upto(attention_mask, pool_index)
        extent = Extent.of(spans, reason) if spans else Extent.read(attention_mask, reasoning_labels)
        first, last = extent.first, extent.last
        input_ids, attention_mask = input_ids[:, first:last], attention_mask[:, first:last]
        if not self.pads_left and not extent.from_left:
            raise left_padding(self.causal_lm)
        if reason:
            check_rope(self.config, extent.longest)
        hidden = self._last_hidden_state(input_ids, attention_mask, extent)
        logits = self.classifier(pool(hidden, attention_mask, pool_index - first, self.pooling))
        if reason:
            labels = reasoning_labels[:, first:last]  # pyright: ignore
            loss = chunked_lm_loss(
                hidden, labels, self.lm_head.weight, self.lm_head.bias, self.chunk_size, extent.targets
            )
            return DualHeadOutput(logits=logits, reasoning_loss=loss)
        # DDP and FSDP expect a gradient for every parameter on every rank, also where this rank's
        # rows, or this step's alpha, leave the LM head unread. A tied one has that of the embedding.
        tied = self.causal_lm.get_input_embeddings().weight
        unread = sum(
            (weight.flatten()[0] * 0 for weight in self.lm_head.parameters() if weight is not tied),
            start=logits.new_zeros(()),
        )
        if return_reasoning_loss:
            return DualHeadOutput(logits=logits, reasoning_loss=unread.expand(len(logits)))
        return DualHeadOutput(logits=logits + unread if unread.requires_grad else logits)

    def runs_unpadded(self, extent: Extent) -> bool:
        """Whether such a batch is run without its padding."""
        return self.padding_free and (self.longest_unpadded is None or extent.longest <= self.longest_unpadded)

    def _last_hidden_state(self, input_ids: Tensor, attention_mask: Tensor, extent: Extent) -> Tensor:
        padded = extent.tokens < attention_mask.numel()
        # Some decoders cut a mask to the number of tokens; the offsets of the rows are one more than rows.
        if padded and self.runs_unpadded(extent) and extent.tokens > len(attention_mask):
            return unpadded.last_hidden_state(self.backbone, input_ids, attention_mask, extent)
        return last_hidden_state(self.backbone, input_ids, attention_mask)

    def compile_blocks(self, **options: Any) -> None:
        """Compile the decoder blocks: one graph for all of them, and for all shapes.

        The loss and the heads stay out: compiled with them, every batch of other lengths would be a graph of its own.

        Args:
            **options: of ``torch.compile``.
        """
        for module in self.modules():
            if self._is_block(module):
                module.compile(**options)

    def _is_block(self, module: nn.Module) -> bool:
        return type(module).__name__ in (self.causal_lm._no_split_modules or ())

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Composer asks which modules FSDP wraps by themselves: the decoder blocks, and a head of another precision."""
        if module is self.classifier:  # FSDP wants one precision in all that it wraps together
            return self.classifier.out_proj.weight.dtype != self.lm_head.weight.dtype
        return self._is_block(module)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """Composer asks which modules activation checkpointing wraps: the decoder blocks."""
        return module is not self.classifier and self.fsdp_wrap_fn(module)


def check_pool_index(reasoning_labels: Tensor | None) -> None:
    """Refuse a rationale in a batch that does not say where the input ends: the answer would be pooled."""
    if reasoning_labels is not None:
        raise UserError(
            'pool_index: missing beside reasoning_labels; expected [B], the position of the last token of each input'
        )
