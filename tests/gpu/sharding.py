"""FSDP1 and FSDP2 with one rank by NCCL: losses, exports and checkpoints against a run without FSDP."""

import shutil

from gpu.common import TINY, Clock, emit, on_gpu, section, told, trained
from gpu.product import WHOLE, furthest, weights

from dhrd_plugin.export.from_checkpoint import export_checkpoint
from dhrd_plugin.training import checks

STEPS = 4 if TINY else 8
FIXED = ('model.padding_free=false', 'algorithms.gradient_clipping=null', f'max_duration={STEPS}ba')


def cases(version):
    """name: (settings of FSDP, more overrides)."""
    kept = {'activation_checkpointing': 'true'}
    if version == 1:
        kept['activation_checkpointing_reentrant'] = 'false'
    found = {}
    for lora in (False, True):
        name, more = ('LoRA', ('model.lora.lora_dropout=0.0',)) if lora else ('whole', WHOLE)
        found[f'{name}, full'] = {'state_dict_type': 'full'}, more
        found[f'{name}, sharded'] = {'state_dict_type': 'sharded'}, more
        found[f'{name}, full, activation checkpointing'] = {'state_dict_type': 'full', **kept}, more
    found['whole, full, fp32'] = {'state_dict_type': 'full'}, (*WHOLE, 'precision=fp32')
    found['whole, full, padding_free'] = {'state_dict_type': 'full'}, (*WHOLE, 'model.padding_free=true')
    found['whole, full, class_weights'] = {'state_dict_type': 'full'}, (*WHOLE, 'model.class_weights=[1.0, 2.0]')
    return found


def one_run(settings, more):
    """The losses, the exported weights, the clock, and how far the export of the checkpoint is from the run's own."""
    clock = Clock()
    given = ', '.join(f'{key}: {value}' for key, value in settings.items())
    fsdp = (f'fsdp_config={{{given}}}', 'save_folder=${output_dir}/checkpoints') if settings else ()
    trainer, series, _, folder = trained(*FIXED, *more, *fsdp, f'save_interval={STEPS}ba', watch=clock)
    trainer.close()
    found, again = weights(folder), None
    if settings:
        export_checkpoint(str(folder / 'checkpoints' / 'latest-rank0.pt'), folder / 'again' / 'slim')
        again = furthest(found, weights(folder / 'again'))
    shutil.rmtree(folder)  # 2 GB each
    return series['loss/train/total'], found, clock, again


def against_one_process(version):
    checks.check_fsdp = lambda *_: None  # it refuses one process, which Composer does not
    plain = {}
    for name, (settings, more) in cases(version).items():
        what = {'version': version, 'case': name}
        if not on_gpu() and ('fp32' in name or version == 1):
            continue
        with told('fsdp', **what):
            if more not in plain:
                plain[more] = one_run({}, more)
            losses, wanted, *_ = plain[more]
            mine, found, clock, again = one_run({'version': version, **settings}, more)
            far = max(abs(a - b) / abs(b) for a, b in zip(mine, losses))
            emit(
                'fsdp',
                **what,
                loss_difference=far,
                export_difference=furthest(found, wanted),
                checkpoint_difference=again,
                trained=clock.trained,
                without_gradient=len(clock.without),
                dtypes=sorted(clock.dtypes),
                ms=clock.ms,
                losses=mine,
            )


@section(150, alone=False)
def fsdp2():
    """FSDP2: state dicts full and sharded, activation checkpointing, whole and LoRA, class weights."""
    against_one_process(2)


@section(150, alone=False)
def fsdp1():
    """FSDP1, which needs a GPU: the same."""
    against_one_process(1)
