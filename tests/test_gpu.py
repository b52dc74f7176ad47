"""What only a GPU can show. Without one these tests are deselected."""

import math

import pytest
import torch
from conftest import ALL, DECODER_ONLY, SMALL_PRESETS, WIDE, awake, different, fit, log_of, tiny

import sample
from model import PRESETS, build
from train import OBJECTIVES

pytestmark = pytest.mark.gpu
LEARNED = [(preset, dataset, objective) for preset in SMALL_PRESETS for dataset, objective in ALL
           if PRESETS[preset].arch in OBJECTIVES[objective].archs]

@pytest.mark.parametrize('how', [{'temperature': 0}, {'top_k': 5}, {'top_p': 0.8}])
@pytest.mark.parametrize('preset', [*DECODER_ONLY, 'llama windows', 'transformer', 't5'])
def test_a_graph_writes_what_a_cpu_writes(preset, how):
    """Beyond block_size, too, and in rows that end at different steps."""
    torch.backends.cudnn.allow_tf32 = False  # of an LSTM
    name, *window = preset.split()
    windows = {'window': '3 0'} if window else {}
    model = awake(build(tiny(name, vocab_size=30, **windows)))
    ids, texts = torch.randint(30, (3, 5)), []
    for device in ('cpu', 'cuda'):
        net, prompt, length, cache = model.to(device), ids.to(device), 40, None
        if net.config.arch == 'encdec':
            prompt, length, cache = prompt[:, :1], 11, net.encode(prompt, torch.ones_like(prompt))
        texts.append(torch.stack([*sample.generate(net, prompt, length, seed=3, end_ids=[7],
                                                   cache=cache, **how)]).tolist())
    assert texts[0] == texts[1]

@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('preset, dataset, objective', LEARNED)
def test_every_objective_trains_in_16_bits(folders, tmp_path, preset, dataset, objective, dtype):
    flags = dict(preset=preset, objective=objective, max_iters=20, device='cuda', dtype=dtype,
                 freeze='tokens blocks.0.' * (preset == 't5'))  # the relative bias alone learns
    fit(tmp_path, folders / dataset, **{**WIDE, **flags, 'optimizer': 'muon', 'eval_iters': 1})
    assert all(math.isfinite(float(row['val_loss'])) for row in log_of(tmp_path))

@pytest.mark.parametrize('preset, dataset', [('gpt2', 'd'), ('nano', 'd'), ('bert', 'text')])
def test_what_is_compiled_learns_the_same(folders, tmp_path, preset, dataset):
    flags = {**WIDE, 'preset': preset, 'max_iters': 20, 'device': 'cuda', 'dtype': 'float32'}
    losses = []
    for compile in (False, True):
        fit(tmp_path / str(compile), folders / dataset, **flags, compile=compile)
        losses.append(float(log_of(tmp_path / str(compile))[-1]['val_loss']))
    assert losses[1] == pytest.approx(losses[0], abs=0.02)

def test_a_resumed_run_is_the_unbroken_one(folders, tmp_path):
    flags = {**WIDE, 'device': 'cuda', 'dtype': 'bfloat16', 'dropout': 0.1, 'optimizer': 'muon'}
    whole = fit(tmp_path / 'whole', folders / 'd', **flags)
    fit(tmp_path / 'cut', folders / 'd', **{**flags, 'max_iters': 3, 'lr_decay_iters': 6})
    cut = fit(tmp_path / 'cut', init_from='resume', max_iters=6)
    assert not different(cut, whole)
