"""Eq. 1 to 4 of arXiv:2509.21487 as plainly as they can be written; shares no code with the package.

One row at a time, its own token ids, full logits, sums written out; no batch, padding or chunk.
"""

import math

import torch


def token_ids(text, vocab):
    return [vocab[word] for word in text.split()]


def row_losses(network, row, vocab, label_names, targets='sequence', pooling='last', layout='reason_first'):
    """Classification and reasoning loss of one row (Eq. 2, and Eq. 1 and 3)."""
    x = token_ids(row['input_text'], vocab)
    s = list(x)
    first = 1 if targets == 'sequence' else len(x)  # the first supervised position
    if row['rationale'] is not None:
        reasoning = [vocab['<REASON>']] + token_ids(row['rationale'], vocab) if row['rationale'] != '' else []
        answer = [vocab['<ANS>']] + token_ids(row['answer'], vocab)
        s += answer + reasoning if layout == 'label_first' else reasoning + answer
        first += targets == 'rationale' and (layout == 'label_first' or reasoning != [])

    out = network.causal_lm(input_ids=torch.tensor([s]), output_hidden_states=True, use_cache=False)
    states, lm_logits = out.hidden_states[-1][0], out.logits[0]

    pooled = states[len(x) - 1] if pooling == 'last' else sum(states[i] for i in range(len(x))) / len(x)
    classification = classification_loss(log_softmax(head_logits(network.classifier, pooled)), row, label_names)
    if row['rationale'] is None:
        return classification, 0 * classification
    terms = [-log_softmax(lm_logits[t - 1])[s[t]] for t in range(first, len(s))]
    return classification, sum(terms) / len(terms)


def classification_loss(log_p, row, label_names, soft_label_weight=0.5):
    """Of the label, of the probabilities, or of both; a row may lack one of them."""
    label, soft = None, None
    if row['label']:
        label = -log_p[label_names.index(row['label'])]
    if row.get('probabilities'):
        soft = -sum(row['probabilities'][name] * log_p[index] for index, name in enumerate(label_names))
    if label is None or soft is None:
        return soft if label is None else label
    return (1 - soft_label_weight) * label + soft_label_weight * soft


def head_logits(head, pooled):
    """A linear layer without bias, or two with GELU between."""
    if getattr(head, 'norm', None) is not None:
        deviation = pooled - pooled.mean()
        pooled = head.norm.weight * deviation / (deviation.square().mean() + 1e-5).sqrt() + head.norm.bias
    if hasattr(head, 'dense'):
        inner = head.dense.weight @ pooled + head.dense.bias
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        return head.out_proj.weight @ inner + head.out_proj.bias
    return head.out_proj.weight @ pooled


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - shifted.exp().sum().log()


def total_loss(
    network,
    rows,
    vocab,
    label_names,
    alpha=1.0,
    beta=1.0,
    targets='sequence',
    pooling='last',
    weighted=None,
    layout='reason_first',
):
    """Eq. 4, a mean over the rows; ``weighted``: a row's weight counts in 'both' losses or in 'reasoning'."""
    total = 0
    for row in rows:
        classification, reasoning = row_losses(network, row, vocab, label_names, targets, pooling, layout)
        total = total + (row['weight'] if weighted == 'both' else 1) * beta * classification
        total = total + (row['weight'] if weighted else 1) * alpha * reasoning
    return total / len(rows)


def gradients(loss, network):
    """Of every trainable parameter, by name; 0 where the loss does not depend on it."""
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), values)}
