"""FSDP as the YAML spells it, for Composer's ``parallelism_config``; the version stands in it."""

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.distributed
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.fsdp import FSDPModule

from dhrd_plugin.errors import UserError, nearest


class CallbacksMayBeNew(DefaultLoadPlanner):
    """Leaves what a callback remembers as it is where the shards have nothing of it; torch would refuse them."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """Look for what there is."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        known = metadata.state_dict_metadata
        self.state_dict = {
            name: value
            for name, value in self.state_dict.items()
            if name in known or not name.startswith('state.callbacks.')
        }


class _Fsdp2Config(FSDP2Config):
    """Composer's, with a load planner, which Composer takes for FSDP1 alone."""

    @property
    def load_planner(self) -> Any:
        return CallbacksMayBeNew()


def fsdp_version(settings: Mapping[str, Any]) -> int:
    """The ``version`` of a ``fsdp_config``; by default Composer's: ``$FSDP_VERSION``, else 1."""
    found = settings.get('version', os.environ.get('FSDP_VERSION', '1'))
    if str(found) not in ('1', '2'):
        raise UserError(f'fsdp_config.version: found {found!r}; expected 1 or 2')
    return int(found)


def build_fsdp(settings: Mapping[str, Any]) -> FSDPConfig | FSDP2Config:
    """Composer's config of the version that ``settings`` ask for, with the fields that they give it.

    A key that this version does not have is refused; Composer would drop it with a warning.
    """
    kind = (FSDPConfig, FSDP2Config)[fsdp_version(settings) - 1]
    names = sorted(field.name for field in fields(kind) if field.init)
    given = {name: value for name, value in settings.items() if name != 'version'}
    for name in given:
        if name not in names:
            raise UserError(f'fsdp_config.{name}: unknown key of {kind.__name__}; {nearest(name, names)}')
    return (
        _Fsdp2Config(**given) if kind is FSDP2Config else FSDPConfig(**{'load_planner': CallbacksMayBeNew(), **given})
    )


def average_gradients(model: nn.Module) -> None:
    """Make FSDP2 average gradients over gloo as it does over NCCL; a model without FSDP2 is left alone.

    gloo takes the average that FSDP2 asks of it for a sum (pytorch issue 162338), so that on CPUs
    every gradient, and with it the clipping, would grow with the number of ranks.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded or torch.distributed.get_backend() != 'gloo' or not _gloo_sums():
        return
    ranks = dist.get_world_size()

    def divide(gradients: Tensor) -> None:
        gradients.div_(ranks)

    for module in sharded:
        module.set_all_reduce_hook(divide)


def _gloo_sums() -> bool:
    average = torch.empty(1)
    ones = torch.ones(dist.get_world_size())
    torch.distributed.reduce_scatter_tensor(average, ones, op=torch.distributed.ReduceOp.AVG)
    return float(average) != 1
