"""All sections, in the order of their worth; what they need is imported before they are forked."""

import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from gpu import parity, product, serving, sharding, speed  # noqa: F401
from gpu.common import SECTIONS

ORDER = ('env', 'parity_tiny', 'parity_real', 'product', 'export', 'fsdp2', 'fsdp1', 'loss_memory', 'speed', 'shapes')
ORDER += ('composer_loop', 'syncs', 'predict', 'chain_of_thought', 'compiled')
assert set(ORDER) == set(SECTIONS)
