"""
train.py keeps its promises: a step means the same in any number of micro-batches and processes, a resumed run is the
unbroken one bit for bit, evaluation changes nothing, every window is read once an epoch, and what a user can get wrong is
one line. Run under torchrun, this file itself is one of two processes (see many_runs).
"""

import collections
import contextlib
import copy
import csv
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import model as models
import prepare_data
import sample
import train

TEXT = ''.join(f'{i}. The quick brown 狐狸 jumps over {i * i} lazy 犬, e\u0301t 🦊 naps.\n' for i in range(70))
TINY = dict(n_layer=1, n_embd=16, n_head=2, mlp_dim=32, block_size=8, device='cpu', dtype='float32', batch_size=4,
            eval_iters=2, eval_interval=1000, log_interval=1000, sample_tokens=0, max_iters=8, warmup_iters=2, seed=5)
PRESETS = ['gpt2', 'palm', 'llama', 'nano', 'lstm']
ONE_THREAD = {**os.environ, 'OMP_NUM_THREADS': '1'}  # tiny products: threads would only wait for each other


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """One thread as in the subprocesses, so that sums round alike; no pictures; and Ctrl-C of the tests stays theirs."""
    monkeypatch.setattr(train.Log, 'plot', lambda log: None)  # drawing would take most of the time
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def prepared(folder, text=TEXT, val='', tokenizer='char'):
    """A data folder of a made-up text."""
    for name in filter(None, ('text', val and 'val')):
        folder.with_name(f'{folder.name}.{name}').write_text(text if name == 'text' else val, encoding='utf-8', newline='\n')
    prepare_data.prepare(prepare_data.Settings(
        input=[f'{folder}.text'], val=[f'{folder}.val'] if val else [], tokenizer=tokenizer, out_dir=str(folder)))
    return str(folder)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp('data') / 'd')


def fit(folder, out, stop_at=None, **flags):
    """
    Train as the command does, in this process; on resume only the flags given here. stop_at: as if a signal came before
    that step. Returns (model, state).
    """
    base = {} if flags.get('init_from') in ('resume', 'auto') else {**TINY, 'dataset': folder}
    model, s, tokenizer, text, val, checkpoint, _ = train.start({**base, 'out_dir': str(out), **flags})
    step = itertools.count(checkpoint['step'] if checkpoint else 0)
    return model, train.train(model, text, val, s, tokenizer, checkpoint, stop=lambda: next(step) == stop_at)


def different(a, b):
    """The names of the weights that are not bit for bit the same."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])]


def read(path):
    return torch.load(path, weights_only=True)


def log_rows(out):
    with open(Path(out) / 'log.csv', newline='', encoding='utf-8') as f:
        return list(csv.reader(f))


def ragged(data, rows, rng, block_size):
    """An objective whose examples differ in length and in how many targets they ask; every fifth asks none."""
    examples = train.causal_lm(data, rows, rng, block_size)
    for row, e in zip(rows, examples):
        n = 1 + row * 3 % block_size
        e['ids'], e['targets'] = e['ids'][:n], e['targets'][:n].copy()
        e['targets'][row % 2::3] = models.IGNORE
        if row % 5 == 0:
            e['targets'][:] = models.IGNORE
    return examples


@contextlib.contextmanager
def recorded_norms():
    """The length of the gradient at every step, as clipping sees it."""
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def record(*args, **kwargs):
        norms.append(clip(*args, **kwargs).item())
        return torch.tensor(norms[-1])

    torch.nn.utils.clip_grad_norm_ = record
    try:
        yield norms
    finally:
        torch.nn.utils.clip_grad_norm_ = clip

# -----------------------------------------------------------------------------
# One step: micro-batches, processes


@settings(max_examples=12)
@given(k=st.integers(1, 4), n=st.integers(1, 4), step=st.integers(0, 30), preset=st.sampled_from(PRESETS),
       objective=st.sampled_from(['causal_lm', 'ragged']))
@example(k=3, n=2, step=1, preset='gpt2', objective='ragged')
def test_k_micro_batches_are_one_big_batch_and_one_mean_over_its_targets(data, monkeypatch, k, n, step, preset, objective):
    """Loss and gradient are those of the plain mean over every asked target, however the batch is cut."""
    # b1: not divided by k; or a mean of means
    monkeypatch.setitem(train.OBJECTIVES, 'ragged', ragged)

    def prepared_model(k, n):
        flags = {**TINY, 'dataset': data, 'preset': preset, 'gradient_accumulation_steps': k, 'batch_size': n}
        model, s, _, text, _, _, machine = train.start(flags)
        s.objective = objective
        torch.manual_seed(1)
        for p in model.parameters():  # nano starts with zeros, which would hide most gradients
            torch.nn.init.normal_(p, std=0.2)
        return model, s, text, machine

    cut, big = prepared_model(k, n), prepared_model(1, k * n)
    losses = [train.gradient(step, model, model, text, s, machine, 0) for model, s, text, machine in (cut, big)]
    plain, _, text, _ = prepared_model(k, n)
    nats, asked = 0.0, 0
    for row in range(step * k * n, (step + 1) * k * n):  # one example at a time
        e, = train.OBJECTIVES[objective](text, [row], None, 8)
        targets = torch.tensor(e['targets'])
        nats = nats + F.cross_entropy(plain(torch.tensor(e['ids'])[None])[0][0], targets, reduction='sum')
        asked += int((targets != models.IGNORE).sum())
    expected = nats / max(1, asked)
    expected.backward()
    assert [loss.item() for loss in losses] == pytest.approx([expected.item()] * 2, rel=1e-5), (losses, expected)
    for (name, p), q, r in zip(cut[0].named_parameters(), big[0].parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=2e-6, msg=lambda m: f'{name}, cut and whole: {m}')
        torch.testing.assert_close(p.grad, r.grad, rtol=1e-4, atol=2e-6, msg=lambda m: f'{name}, by hand: {m}')


@given(k=st.integers(1, 12), n=st.integers(1, 12), world=st.integers(1, 5), step=st.integers(0, 1000))
def test_the_processes_share_the_examples_of_a_step_evenly_or_say_why_not(k, n, world, step):
    """Together they take each example of the global batch once, all equally many; else the error names the numbers."""
    s = types.SimpleNamespace(gradient_accumulation_steps=k, batch_size=n)
    ranks = [types.SimpleNamespace(rank=rank, world=world) for rank in range(world)]
    if k % world and n % world:
        with pytest.raises(ValueError, match=f'gradient_accumulation_steps {k} .*batch_size {n} .*{world} processes'):
            train.share(step, s, ranks[0])
        return
    shares = [train.share(step, s, machine) for machine in ranks]
    rows = sorted(row for part in shares for first, m in part for row in range(first, first + m))
    assert rows == list(range(step * k * n, (step + 1) * k * n)), shares
    assert len({tuple(m for _, m in part) for part in shares}) == 1, f'unequal work: {shares}'


def many_runs(folder, out):
    """
    What one process and two must agree on. Called here for one, and by each of two under torchrun. The objective is the
    ragged one, so that ranks have unequally many targets.
    """
    rank, last = (int(os.environ.get(name, default)) for name, default in (('RANK', 0), ('WORLD_SIZE', 1)))
    found = {}
    for name, flags in {
        'micro-batches dealt out': dict(batch_size=3, gradient_accumulation_steps=4),
        'one micro-batch each, clipped': dict(batch_size=3, gradient_accumulation_steps=2, grad_clip=0.05),
        'micro-batches sliced, clipped': dict(batch_size=4, gradient_accumulation_steps=3, grad_clip=0.05),
        'one micro-batch sliced, Muon': dict(batch_size=6, gradient_accumulation_steps=1, optimizer='muon'),
    }.items():
        with recorded_norms() as norms:
            model, state = fit(folder, f'{out}/{name}', max_iters=4, eval_iters=3, eval_interval=2, **flags)
        found[name] = {**model.state_dict(), 'norms': torch.tensor(norms), 'best': torch.tensor(state['best'])}

    model, s, _, _, val, _, machine = train.start({**TINY, 'dataset': folder, 'preset': 'llama'})
    tokens, losses = val.tokens, {}
    for n in (len(tokens), 100, 9, 5):  # uneven; and too few for the second process to have any  (b17: a deadlock)
        val.tokens = tokens[:n]
        losses[f'whole split of {n}'] = torch.tensor(list(train.evaluate(model, val, machine).values()))
    val.tokens, mine = tokens, []
    model.register_forward_hook(lambda *args: mine.append(1))
    for s.eval_iters in (1, 2, 3):
        losses[f'estimate by {s.eval_iters}'] = torch.tensor(train.estimate_loss(model, model, val, s, machine, 0))
    found['evaluation'] = losses

    flags = dict(dropout=0.2, gradient_accumulation_steps=2, preset='llama', n_layer=2)
    whole, _ = fit(folder, f'{out}/unbroken', **flags)
    _, state = fit(folder, f'{out}/broken', stop_at=3 if rank == last - 1 else None, **flags)  # one of them has the signal
    resumed, end = fit(folder, f'{out}/broken', init_from='resume')
    return found, {'batches': len(mine), 'stopped at': state['step'], 'ended at': end['step'],
                   'differs in': different(whole, resumed)}


def torchrun(*words, cwd):
    """Two processes on this machine, talking by gloo."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    result = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1',
                             f'--master_port={port}', *map(str, words)], cwd=cwd, env=ONE_THREAD, capture_output=True,
                            encoding='utf-8', timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_two_processes_train_and_evaluate_and_resume_like_one(data, tmp_path, monkeypatch):
    """Same weights, gradient lengths and losses up to rounding; and two that are stopped go on bit for bit."""
    # b1: under no_sync only backward, clipping before the sum, the mean of the ranks' means; b17: uneven validation
    monkeypatch.setitem(train.OBJECTIVES, 'causal_lm', ragged)
    torchrun(__file__, data, tmp_path / 'two', cwd=tmp_path)
    one, alone = many_runs(data, tmp_path / 'one')
    two, shared = read(tmp_path / 'two' / 'found.pt')
    for name in one:
        for part, expected in one[name].items():
            # Weights: Muon rounds to bfloat16 inside, and AdamW magnifies the smallest gradients
            rtol, atol = (1e-3, 0) if part in ('norms', 'best') or name == 'evaluation' else (2e-3, 2e-4)
            torch.testing.assert_close(two[name][part], expected, rtol=rtol, atol=atol, msg=lambda m: f'{name}, {part}: {m}')
    assert one['one micro-batch each, clipped']['norms'].min() > 0.05, 'clipping had nothing to do'
    assert alone == {'batches': 1 + 2 + 3, 'stopped at': 3, 'ended at': 8, 'differs in': []}, alone
    assert shared == {'batches': 1 + 1 + 2, 'stopped at': 3, 'ended at': 8, 'differs in': []}, shared


def test_torchrun_train_py_is_train_py(data, tmp_path, capsys):
    """The command under torchrun ends with the weights of the command alone, tells the same loss, and tells it once."""
    flags = [f'--{key}={value}' for key, value in {**TINY, 'dataset': data, 'gradient_accumulation_steps': 2}.items()]
    result = torchrun(ROOT / 'train.py', *flags, '--out_dir=two', cwd=tmp_path)
    fit(data, tmp_path / 'one', gradient_accumulation_steps=2)
    one, two = (read(tmp_path / name / 'ckpt.pt') for name in ('one', 'two'))
    for name, weight in one['model'].items():
        torch.testing.assert_close(two['model'][name], weight, rtol=1e-3, atol=1e-4, msg=lambda m: f'{name}: {m}')
    said = [re.findall(r'iter 0: loss (.*?),', text) for text in (capsys.readouterr().out, result.stdout)]
    (alone,), (together,) = said
    assert float(alone) == pytest.approx(float(together), abs=2e-4), said
    assert result.stdout.count('step 8: train loss') == 1 and '2 processes' in result.stdout, result.stdout
    assert [row[:1] for row in log_rows(tmp_path / 'two')] == [['step'], ['0'], ['8']]

# -----------------------------------------------------------------------------
# Stop and go on


@pytest.mark.parametrize('preset, optimizer, dtype, stop_at', [
    ('gpt2', 'adamw', 'float32', 1), ('gpt2', 'muon', 'float32', 5), ('palm', 'adamw', 'bfloat16', 3),
    ('llama', 'muon', 'float32', 4), ('nano', 'muon', 'float32', 2), ('lstm', 'adamw', 'float32', 7),
    ('lstm', 'muon', 'float32', 3), ('gpt2', 'adamw', 'float16', 3), ('nano', 'muon', 'float16', 5)])
def test_a_resumed_run_is_the_unbroken_run(data, tmp_path, preset, optimizer, dtype, stop_at):
    """Weights, optimizers, scaler and log are the same bit for bit, with dropout, in the middle of an epoch."""
    # b17: random numbers, data position or scaler not restored
    flags = dict(preset=preset, optimizer=optimizer, dtype=dtype, dropout=0.2, n_layer=2, eval_interval=3,
                 gradient_accumulation_steps=2)
    fit(data, tmp_path / 'unbroken', **flags)
    _, state = fit(data, tmp_path / 'broken', stop_at=stop_at, **flags)
    assert state['step'] == read(tmp_path / 'broken' / 'ckpt.pt')['step'] == stop_at
    fit(data, tmp_path / 'broken', init_from='resume')
    unbroken, broken = (read(tmp_path / name / 'ckpt.pt') for name in ('unbroken', 'broken'))
    assert broken['step'] == 8 and different(unbroken['model'], broken['model']) == []
    assert broken['best'] == unbroken['best'] and broken['scaler'] == unbroken['scaler']
    assert bool(broken['scaler']) == (dtype == 'float16') and broken['scaler'].get('_growth_tracker', 8) == 8
    for a, b in zip(unbroken['optimizer'], broken['optimizer'], strict=True):
        assert a['param_groups'] == b['param_groups']
        for p in a['state']:
            assert different(a['state'][p], b['state'][p]) == [], f'optimizer state of parameter {p}'
    assert [row[:-1] for row in log_rows(tmp_path / 'broken')] == [row[:-1] for row in log_rows(tmp_path / 'unbroken')]


def start_command(out, cwd, *flags):
    """train.py in the background."""
    words = [f'--{key}={value}' for key, value in {**TINY, 'out_dir': out}.items()]
    return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *words, *flags], cwd=cwd, env=ONE_THREAD,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8')


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def test_sigterm_saves_and_ends_with_143_and_resume_goes_on(data, tmp_path):
    """Nothing is lost between two evaluations: the run goes on from the step at which it was asked to stop."""
    process = start_command('out', tmp_path, '--max_iters=1000000', f'--dataset={data}', '--dropout=0.2',
                            '--lr_schedule=constant', '--eval_interval=1000000')
    wait_for((tmp_path / 'out' / 'ckpt.pt').exists, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, f'{process.returncode}\n{out}\n{err}'
    step = read(tmp_path / 'out' / 'ckpt.pt')['step']
    assert f'stopped at step {step}: ' in out and '--init_from resume' in out, out
    fit(data, tmp_path / 'out', init_from='resume', max_iters=step + 3)
    model, _ = fit(data, tmp_path / 'unbroken', max_iters=step + 3, dropout=0.2, lr_schedule='constant')
    assert different(read(tmp_path / 'out' / 'ckpt.pt')['model'], model) == [], f'stopped at step {step}'


def test_kill_9_at_any_moment_leaves_a_checkpoint_to_go_on_from(data, tmp_path):
    """However the process dies, the command with --init_from resume ends like the run that nobody touched."""
    # b17; and nanoGPT overwrites its checkpoint in place
    flags = dict(max_iters=160, eval_interval=4, eval_iters=1, dropout=0.2, optimizer='muon')
    process = start_command('out', tmp_path, f'--dataset={data}', *(f'--{key}={value}' for key, value in flags.items()))
    rows, delay = np.random.default_rng(7).integers(2, 20), np.random.default_rng(8).uniform(0, 0.02)
    log = tmp_path / 'out' / 'log.csv'
    wait_for(lambda: log.exists() and log.read_text().count('\n') > rows, process)
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=120)
    step = read(tmp_path / 'out' / 'ckpt.pt')['step']
    assert process.returncode == -signal.SIGKILL and 0 < step < 160, f'it was too fast: {process.returncode}, {step}'
    result = command('train.py', '--init_from', 'resume', cwd=tmp_path, env=ONE_THREAD)
    assert f'resumed at step {step}' in result.stdout, result.stdout
    model, _ = fit(data, tmp_path / 'unbroken', **flags)
    assert different(read(tmp_path / 'out' / 'ckpt.pt')['model'], model) == [], f'killed after step {step}'
    steps = [row[0] for row in log_rows(tmp_path / 'out')]
    assert len(set(steps)) == len(steps) and steps[-1] == '160', steps
    drawn = (tmp_path / 'out' / 'loss.png').exists()
    assert drawn == bool(importlib.util.find_spec('matplotlib')), 'a picture where matplotlib is, and only there'


def test_an_interrupted_save_leaves_the_old_checkpoint(data, tmp_path, monkeypatch):
    """When the disk is full the run ends with an error, and what was saved before is whole."""
    fit(data, tmp_path, max_iters=2)
    before, write = (tmp_path / 'ckpt.pt').read_bytes(), torch.save

    def full(checkpoint, f):
        if 'ckpt' not in f.name:  # best.pt still found room
            return write(checkpoint, f)
        f.write(b'half a')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='No space'):
        fit(data, tmp_path, init_from='resume', max_iters=4)
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    assert not list(tmp_path.glob('*.tmp')), 'half a file was left'


def test_a_second_signal_ends_at_once(monkeypatch, capsys):
    """The first is only remembered, the second leaves with 128 + its number."""
    left = []
    monkeypatch.setattr(os, '_exit', left.append)
    signals = train.on_signal()
    os.kill(os.getpid(), signal.SIGTERM)
    assert (list(signals), left) == ([signal.SIGTERM], [])
    os.kill(os.getpid(), signal.SIGINT)
    assert left == [130]


def test_log_csv_has_a_row_for_every_evaluation_once(data, tmp_path):
    """A header, then the steps in order, also where a killed run had written rows that its checkpoint does not know."""
    fit(data, tmp_path, stop_at=5, eval_interval=2)
    rows = log_rows(tmp_path)
    assert rows[0] == ['step', 'train_loss', 'val_loss', 'lr', 'tokens', 'seconds'] and len(rows) == 4, rows
    with open(tmp_path / 'log.csv', 'a') as f:
        f.write('6,1,1,1,1,1\n8,9')  # the last one half written
    fit(data, tmp_path, init_from='resume')
    assert log_rows(tmp_path)[:4] == rows
    assert [row[0] for row in log_rows(tmp_path)] == ['step', '0', '2', '4', '6', '8']
    assert [row[4] for row in log_rows(tmp_path)[1:]] == ['0', '64', '128', '192', '256'], 'tokens: 4 rows of 8 a step'
    s = train.Settings(**{key: value for key, value in TINY.items() if key in train.Settings.__annotations__})
    assert float(log_rows(tmp_path)[3][3]) == pytest.approx(train.learning_rate(4, s))


def test_without_matplotlib_there_is_no_picture_and_no_error(data, tmp_path, monkeypatch):
    """loss.png is an extra: its absence stops nothing."""
    monkeypatch.undo()  # the real plot
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert fit(data, tmp_path, max_iters=1)[1]['step'] == 1
    assert not (tmp_path / 'loss.png').exists() and (tmp_path / 'log.csv').exists()


@pytest.mark.parametrize('dies_at', [0, 2])
def test_a_run_killed_behind_a_checkpoint_keeps_its_row_of_the_log(data, tmp_path, monkeypatch, dies_at):
    """The row of an evaluation is not lost where the process dies right after the checkpoint of that step."""
    def save(path, model, **extra):
        models.save(path, model, **extra)
        if path.endswith('ckpt.pt') and extra['step'] == dies_at:
            raise KeyboardInterrupt  # as good as a kill: nothing after it runs

    monkeypatch.setattr(train, 'save', save)
    with pytest.raises(KeyboardInterrupt):
        fit(data, tmp_path, eval_interval=2)
    monkeypatch.setattr(train, 'save', models.save)
    fit(data, tmp_path, init_from='resume')
    assert [row[0] for row in log_rows(tmp_path)] == ['step', '0', '2', '4', '6', '8'], f'died at step {dies_at}'


def test_a_run_resumed_at_step_0_keeps_its_first_row(data, tmp_path):
    """Step 0 is an evaluation like any other."""
    fit(data, tmp_path, max_iters=0)
    assert [row[0] for row in log_rows(tmp_path)] == ['step', '0']
    fit(data, tmp_path, init_from='resume', max_iters=1)
    assert [row[0] for row in log_rows(tmp_path)] == ['step', '0', '1']


@pytest.mark.parametrize('flags, group', [(dict(weight_decay=0.5), ('weight_decay', 0.5)),
                                          (dict(beta1=0.5, beta2=0.6), ('betas', (0.5, 0.6)))])
def test_flags_of_the_optimizer_count_on_resume(data, tmp_path, flags, group):
    """A flag that is given on resume is not overruled by what the checkpoint remembers of the optimizer."""
    fit(data, tmp_path, max_iters=1)
    fit(data, tmp_path, init_from='resume', max_iters=2, **flags)
    matrices = read(tmp_path / 'ckpt.pt')['optimizer'][0]['param_groups'][0]
    assert tuple(np.atleast_1d(matrices[group[0]])) == tuple(np.atleast_1d(group[1])), matrices


def test_a_resumed_run_writes_where_it_was_read(data, tmp_path, monkeypatch):
    """A folder that was renamed is resumed under its new name; settings otherwise come from the checkpoint."""
    monkeypatch.chdir(tmp_path)
    fit(data, 'first', max_iters=1, batch_size=3, seed=77)
    os.rename('first', 'out')  # out is the default of --out_dir
    s = train.start({'init_from': 'resume'})[1]
    assert (s.batch_size, s.seed, s.out_dir) == (3, 77, 'out')

# -----------------------------------------------------------------------------
# Data


def text_data(data, n, seed=0, split='train'):
    """A split of n tokens, 0, 1, 2, ...: a token tells where it stands."""
    found = train.Data(data, split, seed)
    found.tokens = np.arange(n).astype(np.uint16)
    found.vocab_size = max(n, 1)
    return found


@given(n=st.integers(2, 200), T=st.integers(1, 12), seed=st.integers(0, 3))
@example(n=9, T=8, seed=0)
@example(n=17, T=8, seed=0)
def test_each_epoch_visits_every_window_once(data, n, T, seed):
    """Its windows do not overlap, lie inside of the text, and leave out less than two of them."""
    if n < T + 1:
        return
    text, (first, second) = text_data(data, n, seed), (None, None)
    per_epoch = max(1, (n - 1) // T - 1)
    first, second = (text.window_starts(range(e * per_epoch, (e + 1) * per_epoch), T) for e in (0, 1))
    for starts in (first, second):
        assert np.diff(sorted(starts)).tolist() == [T] * (per_epoch - 1), f'twice, or a gap: {sorted(starts)}'
        assert min(starts) >= 0 and max(starts) + T + 1 <= n, f'windows of {T} + 1 at {starts} in {n} tokens'
    if per_epoch >= 12:
        assert np.argsort(first).tolist() != np.argsort(second).tolist(), 'the same order twice'


def test_every_token_can_be_the_first_of_a_window(data):
    """The offset of an epoch takes all values from 0 to the last that fits, so that the end of the text is read too."""
    # b4: off by one, either way. 16 tokens are 4 windows of 3 + 1 and up to 3 tokens before them
    text = text_data(data, 16)
    offsets = collections.Counter(min(text.window_starts(range(4 * e, 4 * e + 4), 3)) for e in range(200))
    assert sorted(offsets) == [0, 1, 2, 3], offsets


@given(n=st.integers(10, 200), T=st.integers(1, 8), rows=st.lists(st.integers(0, 300), min_size=1, max_size=12),
       order=st.randoms(use_true_random=False))
def test_a_window_is_a_pure_function_of_seed_split_and_row(data, n, T, rows, order):
    """Whatever was asked before, and in whatever order, row i begins at the same token."""
    used, mixed = text_data(data, n, seed=3), rows.copy()
    order.shuffle(mixed)
    used.window_starts(mixed, 2)
    found = dict(zip(mixed, used.window_starts(mixed, T)))
    expected = [text_data(data, n, seed=3).window_starts([row], T)[0] for row in rows]
    assert [found[row] for row in rows] == expected
    assert used.window_starts(rows, T) == expected


def test_seeds_and_splits_have_their_own_windows(data):
    """Another seed, or the other split, reads in another order."""
    ways = [text_data(data, 500, seed, split).window_starts(range(50), 8) for seed in (0, 1) for split in ('train', 'val')]
    assert len({tuple(way) for way in ways}) == 4


@given(n=st.integers(10, 100), T=st.integers(1, 9), first=st.integers(0, 500),
       lowest=st.sampled_from([0, 32_700, 65_400, 200_000]))
def test_targets_are_the_ids_one_later(data, n, T, first, lowest):
    """Every target is the token that follows its id in the text: shifted once, by exactly one. Large ids stay large."""
    # b4; b6: int16 makes 32,768 negative
    text = text_data(data, n)
    text.tokens, text.vocab_size = np.arange(lowest, lowest + n, dtype='uint32' if lowest > 2 ** 16 else 'uint16'), 2 ** 18
    batch = train.get_batch(text, 'causal_lm', T, first, 3)
    assert lowest <= batch['ids'].min() and batch['targets'].max() < lowest + n, batch
    assert batch['ids'].shape == batch['targets'].shape == (3, T) and batch['ids'].dtype == torch.int64
    assert (batch['targets'] - batch['ids'] == 1).all(), batch
    assert (batch['ids'].diff() == 1).all() and set(batch) == {'ids', 'targets'}


def test_block_size_and_one_more_token_are_enough_and_one_less_is_not(data):
    """n = block_size + 1 is the shortest split; below it the error gives both numbers and the remedy."""
    # b4: the bound of the random start, off by one
    assert train.get_batch(text_data(data, 9), 'causal_lm', 8, 0, 2)['targets'].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
    with pytest.raises(ValueError, match=r'train\.bin has 8 tokens, fewer than block_size \+ 1 = 9: lower --block_size'):
        text_data(data, 8).window_starts([0], 8)


def test_two_epochs_across_a_resume_visit_every_window_once_each(data, tmp_path, monkeypatch):
    """What training reads in two epochs, with a stop in the middle of the first, is each window twice: once an epoch."""
    # b17: later epochs saw only the tail
    seen, gradient = [], train.gradient

    def record(step, model, wrapped, text, s, machine, pad_id):
        for first, n in train.share(step, s, machine):
            seen.extend(text.window_starts(range(first, first + n), model.config.block_size))
        return gradient(step, model, wrapped, text, s, machine, pad_id)

    monkeypatch.setattr(train, 'gradient', record)
    folder = prepared(tmp_path / 'short', text=TEXT[:8 * 26 + 3], val=TEXT[:60])       # 25 windows: a step is 10 of them
    fit(folder, tmp_path / 'out', stop_at=1, max_iters=5, batch_size=5, gradient_accumulation_steps=2)
    fit(folder, tmp_path / 'out', init_from='resume')
    assert len(seen) == 50
    for epoch in (seen[:25], seen[25:]):
        assert np.diff(sorted(epoch)).tolist() == [8] * 24, sorted(epoch)


def with_bad_id(folder, split, at):
    """Put an id behind the vocabulary into a data folder."""
    tokens = np.memmap(f'{folder}/{split}.bin', 'uint16', mode='r+')
    tokens[at] = prepare_data.read_json(f'{folder}/meta.json')['vocab_size']
    tokens.flush()
    return folder


@pytest.mark.parametrize('split, at', [('train', 0), ('train', 8), ('val', 3)])
def test_an_id_outside_the_vocabulary_is_named(tmp_path, split, at):
    """Also where only a target has it: never a wrong row, never an index error without a name."""
    # b6
    folder = prepared(tmp_path / 'd', text='abcdefgh', val='hgfedcba')  # 8 + <|endoftext|>: one window
    bad = prepare_data.read_json(f'{folder}/meta.json')['vocab_size']
    with_bad_id(folder, split, at)
    with pytest.raises(ValueError, match=f'{split}.bin holds the id {bad}'):
        fit(folder, tmp_path / 'out')
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()


def test_eval_only_names_an_id_outside_the_vocabulary_too(tmp_path):
    """The whole split is checked as a batch is."""
    # b6
    folder = prepared(tmp_path / 'd', text='abcdefgh' * 9, val='hgfedcba' * 9)
    fit(folder, tmp_path / 'out', max_iters=0)
    with_bad_id(folder, 'val', 70)
    with pytest.raises(ValueError, match=r'val\.bin holds the id'):
        train.main([f'--out_dir={tmp_path}/out', '--eval_only'])


def test_memory_does_not_grow_with_the_batches(data, tmp_path):
    """Reading all over a large file leaves no trace: anonymous memory stays, whatever of the file the kernel keeps."""
    # b6: a memmap that copies, or arrays that are kept. Coarse: 40 MB of batches may add 8 MB
    status = Path('/proc/self/status')
    if not status.exists():
        return  # only Linux tells
    np.memmap(tmp_path / 'large.bin', 'uint16', mode='w+', shape=2 ** 25).flush()  # 64 MB, sparse
    text = train.Data(data, 'train')
    text.tokens = np.memmap(tmp_path / 'large.bin', 'uint16', mode='r')

    def megabytes():
        return int(re.search(r'RssAnon:\s+(\d+)', status.read_text())[1]) / 1024

    for i in range(10):
        train.get_batch(text, 'causal_lm', 1024, 16 * i, 16)
    before = megabytes()
    for i in range(10, 170):
        train.get_batch(text, 'causal_lm', 1024, 16 * i, 16)
    assert megabytes() - before < 8, f'{before:.0f} MB became {megabytes():.0f} MB'


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), pad=st.integers(0, 300), label=st.integers(-100, 9))
def test_collate_pads_on_the_right_and_says_what_is_real(lengths, pad, label):
    """ids are filled with pad_id, targets with IGNORE, the rest with 0; keep appears only where it is needed."""
    examples = [{'ids': np.arange(n) + 1000, 'decoder_ids': np.arange(n, dtype=np.uint16) + 7, 'targets': [9] * n,
                 'segments': np.ones(n, np.int32), 'label': label, 'about': 'the source 原文'} for n in lengths]
    batch = train.collate(examples, pad)
    T, same = max(lengths), len(set(lengths)) == 1
    assert set(batch) == {'ids', 'decoder_ids', 'targets', 'segments', 'label'} | (set() if same else {'keep'})
    assert batch['label'].tolist() == [label] * len(lengths)
    for name, values, fill in (('ids', range(1000, 1006), pad), ('decoder_ids', range(7, 13), pad),
                               ('targets', [9] * 6, models.IGNORE), ('segments', [1] * 6, 0)):
        assert batch[name].dtype == torch.int64, name
        assert batch[name].tolist() == [list(values[:n]) + [fill] * (T - n) for n in lengths], name
    if not same:
        assert batch['keep'].dtype == torch.bool
        assert batch['keep'].tolist() == [[True] * n + [False] * (T - n) for n in lengths]


@pytest.mark.parametrize('cycle', ['abc', '春夏秋冬', 'a\u0301e\u0300🌸🦊'])
def test_a_cycle_is_learned_and_continued(tmp_path, cycle):
    """A text in which each character tells the next is predicted almost surely, and greedy writing goes on with it."""
    # b4: with a double shift the loss falls just as well, but the text that comes out skips characters
    folder = prepared(tmp_path / 'd', text=cycle * 120)
    model, _ = fit(folder, tmp_path / 'out', preset='llama', max_iters=80, learning_rate=0.02)
    nats = slow_nats(model, train.Data(folder, 'val').tokens[:-1], 8)  # the last is <|endoftext|>, never seen in training
    assert np.mean(nats) < 0.1, np.mean(nats)
    tokenizer = prepare_data.load_tokenizer(folder)
    greedy = sample.Settings(temperature=0, max_new_tokens=9, seed=0)
    text = ''.join(text for _, text in sample.write(model.eval(), tokenizer, cycle[:2], greedy))
    assert cycle[:2] + text == (cycle * 9)[:11]

# -----------------------------------------------------------------------------
# Optimization


@pytest.mark.parametrize('flags, points', [
    (dict(), {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.1, 35: 0.955018, 60: 0.605, 110: 0.11, 5000: 0.11}),
    (dict(lr_schedule='linear'), {0: 0.1, 10: 1.1, 35: 0.8525, 60: 0.605, 110: 0.11, 5000: 0.11}),
    (dict(lr_schedule='constant'), {0: 0.1, 9: 1.0, 10: 1.1, 110: 1.1, 5000: 1.1}),
    (dict(lr_schedule='linear', min_lr=0.0), {60: 0.55, 110: 0.0}),
    (dict(lr_schedule='linear', lr_decay_iters=60, min_lr=0.1), {35: 0.6, 60: 0.1, 100: 0.1}),
    (dict(lr_schedule='linear', warmup_iters=0), {0: 1.1, 55: 0.605})])
def test_learning_rate_at_points_worked_by_hand(flags, points):
    """Ten steps of warm-up to 1.1, a hundred down to a tenth of it unless told otherwise."""
    s = train.Settings(**{'learning_rate': 1.1, 'warmup_iters': 10, 'max_iters': 110, **flags})
    assert {step: train.learning_rate(step, s) for step in points} == pytest.approx(points, rel=1e-5)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_the_learning_rate_reaches_every_optimizer(data, tmp_path, optimizer):
    """The last step used the schedule's value, and Muon the same schedule at its own height."""
    fit(data, tmp_path, optimizer=optimizer, learning_rate=0.01, muon_learning_rate=0.03)
    expected = {True: 3 * (low := 0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * 5 / 6))), False: low}
    for saved in read(tmp_path / 'ckpt.pt')['optimizer']:
        for group in saved['param_groups']:
            assert group['lr'] == pytest.approx(expected['betas' not in group]), group


class Weights(torch.nn.Module):
    """Weights of given shapes, with given gradients."""

    def __init__(self, gradients):
        super().__init__()
        self.all = torch.nn.ParameterList(torch.randn(g.shape) for g in gradients)
        for p, g in zip(self.all, gradients):
            p.grad = g.clone()


@given(shapes=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=4),
       scale=st.floats(1e-3, 1e3))
@example(shapes=[(4, 16), (16, 4), (8, 8), (8, 8)], scale=1.0)
def test_a_step_of_muon_is_nearly_orthogonal(shapes, scale):
    """The first step has all singular values near 1, in the directions of the gradient, whatever the gradient's size."""
    gradients = []
    for shape in shapes:  # singular values from 0.2 to 1: what is all but 0 would need more iterations
        u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        gradients.append(u @ torch.diag(torch.linspace(0.2, 1, min(shape))) @ v * scale)
    model = Weights(gradients)
    before = [p.detach().clone() for p in model.all]
    s = train.Settings(optimizer='muon', weight_decay=0.0, muon_learning_rate=0.5)
    optimizer, = train.make_optimizers(model, s, 'cpu')
    optimizer.step()
    for p, old, g in zip(model.all, before, gradients):
        step = (old - p.detach()) / 0.5 / max(1, p.size(0) / p.size(1)) ** 0.5         # tall matrices go further [3]
        values = torch.linalg.svdvals(step)
        assert 0.6 < values.min() and values.max() < 1.3, f'{tuple(p.shape)}: {values}'
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        cosine = F.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0).item()
        assert cosine > 0.9, f'{tuple(p.shape)}: cosine {cosine} to the nearest orthogonal matrix'


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_matrices_and_embeddings_decay_and_vectors_do_not(data, optimizer):
    """With a zero gradient a step leaves w (1 - lr * weight_decay), which is what decoupled means; a bias stays."""
    # b5, [1]
    model, s, *_ = train.start({**TINY, 'dataset': data, 'optimizer': optimizer, 'weight_decay': 0.5, 'beta2': 0.9,
                                'learning_rate': 0.1, 'muon_learning_rate': 0.2})
    optimizers = train.make_optimizers(model, s, 'cpu')
    owners = collections.Counter(p for o in optimizers for group in o.param_groups for p in group['params'])
    assert owners == collections.Counter(model.parameters()), 'each weight in one group of one optimizer'
    assert [type(o).__name__ for o in optimizers if 'betas' in o.defaults] == ['AdamW']
    assert all(group['betas'] == (s.beta1, 0.9) for o in optimizers for group in o.param_groups if 'betas' in group)
    before = {name: p.detach().clone().normal_() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.data.copy_(before[name])
        p.grad = torch.zeros_like(p)
    for o in optimizers:
        o.step()
    for name, p in model.named_parameters():
        muon = optimizer == 'muon' and name.startswith('decoder.blocks')
        left = 1.0 if p.dim() < 2 else 1 - (0.2 if muon else 0.1) * 0.5
        torch.testing.assert_close(p.data, before[name] * left, msg=lambda m: f'{name}, expected {left} of it: {m}')


def scaled_machine(scale):
    """A Machine that scales its losses, as float16 does on a GPU, but computes in float32: rounding hides nothing."""
    class Scaled(train.Machine):
        def __init__(self, s):
            super().__init__(s)
            self.scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    return Scaled


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_clipping_sees_the_gradient_and_not_its_scaled_copy(data, tmp_path, monkeypatch, optimizer):
    """With a loss scale of 65536 and the limit well below the gradient, norms and weights are those without a scale."""
    # b9: clipped before unscale_
    flags = dict(grad_clip=0.1, optimizer=optimizer, gradient_accumulation_steps=2)
    with recorded_norms() as plain:
        expected, _ = fit(data, tmp_path / 'plain', **flags)
    monkeypatch.setattr(train, 'Machine', scaled_machine(65536.0))
    with recorded_norms() as scaled:
        model, _ = fit(data, tmp_path / 'scaled', **flags)
    assert min(plain) > 0.1 and scaled == pytest.approx(plain, rel=1e-4), f'{plain}, with a scaler {scaled}'
    for name, p in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], p, rtol=1e-3, atol=1e-5, msg=lambda m: f'{name}: {m}')


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('value', [math.inf, math.nan])
def test_an_overflow_skips_the_step_of_every_optimizer(data, tmp_path, monkeypatch, optimizer, value):
    """Where float16 overflows in one matrix, no weight moves at all, the scale is halved, and training goes on."""
    weights, gradient = {}, train.gradient

    def overflow(step, model, *args):
        loss = gradient(step, model, *args)
        weights[step] = copy.deepcopy(model.state_dict())
        if step == 2:
            next(p for name, p in model.named_parameters() if name.endswith('proj.weight')).grad[0, 0] = value
        return loss

    monkeypatch.setattr(train, 'gradient', overflow)
    monkeypatch.setattr(train, 'Machine', scaled_machine(1024.0))
    model, _ = fit(data, tmp_path, optimizer=optimizer)
    assert different(weights[2], weights[3]) == [], 'the step of the overflow was not skipped as a whole'
    assert different(weights[3], weights[4]) and all(p.isfinite().all() for p in model.parameters())
    assert read(tmp_path / 'ckpt.pt')['scaler']['scale'] == 512.0


@pytest.mark.parametrize('limit', [0.1, 0.7])
def test_a_clipped_gradient_has_the_length_of_the_limit(data, tmp_path, monkeypatch, limit):
    """All weights together move by learning rate x limit, where the step is the gradient itself."""
    monkeypatch.setattr(train, 'make_optimizers', lambda model, s, device: [torch.optim.SGD(model.parameters())])
    flags = dict(warmup_iters=0, learning_rate=0.5, grad_clip=limit)
    (a, _), (b, _) = (fit(data, tmp_path / str(n), max_iters=n, lr_decay_iters=9, **flags) for n in (0, 1))
    moved = torch.cat([(p - q).flatten() for p, q in zip(a.parameters(), b.parameters())]).norm().item()
    assert moved == pytest.approx(0.5 * limit, rel=1e-3)


def test_every_micro_batch_has_its_own_dropout(data, tmp_path, monkeypatch):
    """What is dropped is drawn from the seed and the place in training: never the same mask twice, nor by another seed."""
    seen, gradient = [], train.gradient

    def record(step, model, *args):
        handle = model.register_forward_pre_hook(lambda *args: seen.append(torch.initial_seed()))
        loss = gradient(step, model, *args)
        handle.remove()
        return loss

    monkeypatch.setattr(train, 'gradient', record)
    for seed in (1, 2):
        fit(data, tmp_path / str(seed), dropout=0.2, gradient_accumulation_steps=2, seed=seed)
    assert len(seen) == len(set(seen)) == 2 * 8 * 2, collections.Counter(seen).most_common(3)


def test_no_limit_is_no_limit(data, tmp_path):
    """--grad_clip 0 is the same as a limit that no gradient reaches, and not a gradient of length 0."""
    (a, _), (b, _) = (fit(data, tmp_path / str(limit), grad_clip=limit) for limit in (0.0, 1e9))
    assert different(a, b) == []


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_what_is_not_finite_stops_the_run_before_it_reaches_the_weights(data, tmp_path, monkeypatch, what):
    """The error names the step, the weights are those of the step before, and ckpt.pt is as it was and can be loaded."""
    weights, ckpt, gradient = {}, {}, train.gradient

    def poisoned(step, model, *args):
        weights[step], ckpt[step] = copy.deepcopy(model.state_dict()), (tmp_path / 'ckpt.pt').read_bytes()
        loss = gradient(step, model, *args)
        if step == 3 and what == 'gradient':
            model.tokens.weight.grad[1, 1] = math.inf
        return loss * math.nan if step == 3 and what == 'loss' else loss

    monkeypatch.setattr(train, 'gradient', poisoned)
    model, s, tokenizer, text, val, _, _ = train.start({**TINY, 'dataset': data, 'out_dir': str(tmp_path),
                                                       'eval_interval': 2})
    with pytest.raises(ValueError, match=rf'step 3: the {what} is not finite.*ckpt\.pt is good'):
        train.train(model, text, val, s, tokenizer)
    assert different(weights[3], model) == []
    assert ckpt[3] == (tmp_path / 'ckpt.pt').read_bytes()
    saved, checkpoint = models.load(str(tmp_path / 'ckpt.pt'))
    assert checkpoint['step'] == 2 and different(saved, weights[2]) == []

# -----------------------------------------------------------------------------
# Evaluation


def slow_nats(model, tokens, T):
    """-log p of every token but the first, one window of T predictions after the other, without dropout; in float64."""
    model, nats = copy.deepcopy(model).eval(), []
    for s in range(0, len(tokens) - 1, T):
        window = torch.tensor(np.array(tokens[s:s + T + 1], np.int64))
        with torch.no_grad():
            logp = model(window[None, :-1])[0][0].double().log_softmax(dim=-1)
        nats += [-logp[t, window[t + 1]].item() for t in range(len(window) - 1)]
    return nats


@settings(max_examples=15)
@given(n=st.integers(2, 60), preset=st.sampled_from(PRESETS), training=st.booleans())
@example(n=9, preset='gpt2', training=True)
def test_the_whole_split_is_scored_token_by_token(data, n, preset, training):
    """Every token but the first is predicted once, without dropout; the model is left in the mode it was in."""
    # b2
    model, _, _, _, val, _, machine = train.start({**TINY, 'dataset': data, 'preset': preset, 'dropout': 0.5, 'n_layer': 2})
    model.train(training)
    val.tokens = val.tokens[:n]
    scores, nats = train.evaluate(model, val, machine), slow_nats(model, val.tokens, 8)
    assert len(nats) == n - 1 and scores['loss'] == pytest.approx(np.mean(nats), rel=1e-4)
    assert scores['perplexity'] == pytest.approx(math.exp(np.mean(nats)), rel=1e-3)
    assert all(m.training == training for m in model.modules()), 'the mode was not restored'
    assert train.evaluate(model, val, machine) == scores, 'twice is not the same'


@pytest.mark.parametrize('tokenizer', ['char', 'byte'])
def test_bits_per_byte_count_the_bytes_of_the_text(tmp_path, tokenizer):
    """A character of Chinese has three bytes and an emoji four, whatever a token is; <|endoftext|> has none."""
    text = '静夜思 李白\n床前明月光，疑是地上霜。e\u0301🌙\n' * 3
    folder = prepared(tmp_path / 'd', text=text * 3, val=text, tokenizer=tokenizer)
    model, _, _, _, val, _, machine = train.start({**TINY, 'dataset': folder})
    nats = slow_nats(model, val.tokens, 8)
    assert len(nats) == (len(text) if tokenizer == 'char' else len(text.encode()))     # n - 1, with <|endoftext|>
    expected = sum(nats) / math.log(2) / len(text.encode())
    assert train.evaluate(model, val, machine)['bits_per_byte'] == pytest.approx(expected, rel=1e-4)


@settings(max_examples=10)
@given(iters=st.integers(1, 4), n=st.integers(1, 5), objective=st.sampled_from(['causal_lm', 'ragged']),
       training=st.booleans(), split=st.sampled_from(['train', 'val']))
def test_an_estimate_is_the_mean_over_its_first_rows(data, monkeypatch, iters, n, objective, training, split):
    """eval_iters batches from row 0 on, every asked target weighing the same, no dropout, the mode restored."""
    # b1, b2
    monkeypatch.setitem(train.OBJECTIVES, 'ragged', ragged)
    model, s, _, *both, _, machine = train.start({**TINY, 'dataset': data, 'dropout': 0.5, 'eval_iters': iters,
                                                  'batch_size': n})
    s.objective, text = objective, both[split == 'val']
    model.train(training)
    nats, asked, plain = 0.0, 0, copy.deepcopy(model).eval()
    for e in train.OBJECTIVES[objective](text, range(iters * n), None, 8):
        with torch.no_grad():
            logp = plain(torch.tensor(e['ids'])[None])[0][0].double().log_softmax(dim=-1)
        for t, target in enumerate(e['targets']):
            if target != models.IGNORE:
                nats, asked = nats - logp[t, target].item(), asked + 1
    found = train.estimate_loss(model, model, text, s, machine, 0)
    assert found == pytest.approx(nats / max(1, asked), rel=1e-4)
    assert all(m.training == training for m in model.modules()), 'the mode was not restored'


def test_evaluation_does_not_disturb_training(data, tmp_path, capsys):
    """Evaluated and sampled at every step or only at the ends: the same weights, with dropout on."""
    # b17: an evaluation that draws random numbers changes what comes after it
    often, _ = fit(data, tmp_path / 'often', dropout=0.2, eval_interval=1, sample_tokens=5)
    never, _ = fit(data, tmp_path / 'never', dropout=0.2)
    assert different(often, never) == []
    assert capsys.readouterr().out.count(': train loss') == 9 + 2


def test_best_pt_holds_the_state_with_the_lowest_validation_loss(data, tmp_path, monkeypatch):
    """Later and worse states go into ckpt.pt only, and a resumed run remembers what the best was."""
    losses = iter([5.0, 5.0, 4.0, 2.0, 3.0, 3.0, 2.5, 2.5, 1.5, 1.5])  # train, val of steps 0, 2, 4; then 6, 8
    monkeypatch.setattr(train, 'estimate_loss', lambda *args: next(losses))
    fit(data, tmp_path, eval_interval=2, stop_at=5)
    assert (read(tmp_path / 'best.pt')['step'], read(tmp_path / 'best.pt')['best']) == (2, 2.0)
    fit(data, tmp_path, init_from='resume', max_iters=6)
    assert (read(tmp_path / 'best.pt')['step'], read(tmp_path / 'ckpt.pt')['step']) == (2, 6)
    fit(data, tmp_path, init_from='resume', max_iters=8)
    assert (read(tmp_path / 'best.pt')['step'], read(tmp_path / 'best.pt')['best']) == (8, 1.5)


def test_target_loss_ends_the_run_with_that_state_as_the_best(tmp_path, capsys):
    """It stops at the first evaluation that reaches it, and best.pt scores it on the whole split."""
    folder = prepared(tmp_path / 'd', text='春夏秋冬' * 120)
    model, state = fit(folder, tmp_path / 'out', max_iters=500, learning_rate=0.02, eval_interval=10, target_loss=0.5)
    assert state['step'] < 500 and state['step'] % 10 == 0, state
    best, checkpoint = models.load(str(tmp_path / 'out' / 'best.pt'))
    assert different(best, model) == [] and checkpoint['step'] == state['step']
    nats = slow_nats(best, train.Data(folder, 'val').tokens, 8)
    assert np.mean(nats) <= 0.5 and checkpoint['best'] == pytest.approx(np.mean(nats), rel=1e-4)
    assert 'target loss 0.5 reached after' in capsys.readouterr().out


def test_target_loss_is_confirmed_on_the_whole_split(data, tmp_path, monkeypatch, capsys):
    """A lucky estimate ends nothing: the whole split says no, the run goes on, and says at the end what was missed."""
    monkeypatch.setattr(train, 'estimate_loss', lambda *args: 0.01)
    _, state = fit(data, tmp_path, eval_interval=4, target_loss=0.02)
    assert state['step'] == 8 and state['best'] > 1, state
    assert 'target loss 0.02 not reached: best validation loss' in capsys.readouterr().out


def test_eval_only_prints_one_line_and_writes_nothing(data, tmp_path, monkeypatch, capsys):
    """`val loss 1.8980, perplexity 6.67, bits per byte 2.738`: of best.pt, over the whole split."""
    monkeypatch.chdir(tmp_path)
    fit(data, tmp_path / 'out', eval_interval=4)
    machine, val = train.Machine(train.Settings(device='cpu', dtype='float32')), train.Data(data, 'val')
    scores = train.evaluate(models.load(str(tmp_path / 'out' / 'best.pt'))[0], val, machine)
    folders = [tmp_path, Path(data)]
    state = lambda: {p: p.stat().st_mtime_ns for folder in folders for p in sorted(folder.rglob('*'))}
    before, _ = state(), capsys.readouterr()
    train.main([f'--out_dir={tmp_path}/out', '--eval_only'])
    out, err = capsys.readouterr()
    assert re.fullmatch(r'val loss \d+\.\d{4}, perplexity \d+\.\d{2}, bits per byte \d+\.\d{3}\n', out), out
    assert [float(x) for x in re.findall(r'\d+\.\d+', out)] == pytest.approx(list(scores.values()), abs=6e-3)
    assert err == '' and state() == before

# -----------------------------------------------------------------------------
# The script


def test_scratch_moves_an_older_run_aside_and_says_so(data, tmp_path, capsys):
    """Nothing is overwritten in silence: ckpt.pt, best.pt and log.csv of the run before get another name."""
    flags = [f'--{key}={value}' for key, value in {**TINY, 'dataset': data, 'out_dir': tmp_path, 'max_iters': 1}.items()]
    train.main(flags)
    old = {name: (tmp_path / name).read_bytes() for name in ('ckpt.pt', 'best.pt', 'log.csv')}
    capsys.readouterr()
    train.main([*flags, '--seed=6'])
    out = capsys.readouterr().out
    for name, content in old.items():
        moved = name.replace('.', '.old.')
        assert (tmp_path / moved).read_bytes() == content and moved in out, out
        assert (tmp_path / name).read_bytes() != content


def test_auto_resumes_where_there_is_a_checkpoint_and_starts_where_there_is_none(data, tmp_path):
    """The same command twice is one run."""
    flags = dict(init_from='auto', dataset=data, **TINY)
    assert train.start({**flags, 'out_dir': str(tmp_path)})[5] is None
    assert fit(data, tmp_path, stop_at=3, **flags)[1]['step'] == 3
    assert train.start({**flags, 'out_dir': str(tmp_path)})[5]['step'] == 3
    model, state = fit(data, tmp_path, **flags)
    assert state['step'] == 8 and different(model, fit(data, tmp_path / 'unbroken')[0]) == []


def test_init_from_a_path_takes_its_weights_and_architecture_and_begins_anew(data, tmp_path):
    """Step 0, fresh optimizers, the flags and not the settings of that run; the file itself is not touched."""
    first, _ = fit(data, tmp_path / 'first', preset='llama', weight_decay=0.7)
    before = (tmp_path / 'first' / 'ckpt.pt').read_bytes()
    s = dict(dataset=data, device='cpu', dtype='float32', sample_tokens=0, eval_iters=1, out_dir=str(tmp_path / 'second'))
    model, s, tokenizer, text, val, checkpoint, _ = train.start({**s, 'init_from': str(tmp_path / 'first' / 'ckpt.pt'),
                                                                'max_iters': 0})
    assert checkpoint is None and s.weight_decay == 0.1 and model.config == first.config
    assert train.train(model, text, val, s, tokenizer)['step'] == 0
    assert different(read(tmp_path / 'second' / 'ckpt.pt')['model'], first) == []
    assert (tmp_path / 'first' / 'ckpt.pt').read_bytes() == before


def test_recipes_give_way_to_flags():
    """A preset brings its own good values, and a flag that is given wins over them."""
    recipe = train.RECIPES['pretrain']['nano']
    assert recipe['optimizer'] == 'muon'
    for name, values in train.RECIPES['pretrain'].items():
        assert name in models.PRESETS and train.Settings(**values), name


@pytest.mark.parametrize('flags, expected', [({}, ('muon', 24)), ({'optimizer': 'adamw', 'batch_size': 2}, ('adamw', 2))])
def test_start_uses_the_recipe_of_the_preset(data, flags, expected):
    """--preset nano alone trains with Muon."""
    s = train.start({'dataset': data, 'preset': 'nano', 'device': 'cpu', 'n_layer': 1, 'n_embd': 16, 'n_head': 2,
                     'block_size': 8, **flags})[1]
    assert (s.optimizer, s.batch_size) == expected


def refused(argv, capsys, monkeypatch):
    """The one line on standard error with which train.py ends, in this process for speed."""
    monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, argv)])
    with pytest.raises(SystemExit) as e:
        prepare_data.run(train.main)
    out, err = capsys.readouterr()
    assert e.value.code == 2, (e.value.code, out, err)
    assert err.startswith('train.py: error: ') and len(err.splitlines()) == 1, out + err
    return err


@pytest.mark.parametrize('flags, named', [
    ('--max_iters 1e4', '--max_iters: 1e4 is not a whole number, such as 10000'),
    ('--max_iters', '--max_iters'),
    ('--max_iters -1', '--max_iters -1: must be at least 0'),
    ('--n_head 5 --n_embd 128', 'n_embd=128 must be a multiple of n_head=5'),
    ('--lerning_rate 1', '--lerning_rate: did you mean --learning_rate?'),
    ('--dataset nowhere', '--dataset nowhere: there is no data folder'),
    ('--dataset tang', 'prepare_data.py --dataset tang'),
    ('--learning_rate nan', '--learning_rate nan: must be finite and above 0'),
    ('--learning_rate 0', '--learning_rate 0.0: must be above 0'),
    ('--grad_clip -1', '--grad_clip -1.0: must be at least 0'),
    ('--eval_interval 0', '--eval_interval 0: must be at least 1'),
    ('--beta1 1', '--beta1 1.0: must be at least 0 and below 1'),
    ('--dropout 1.5', 'dropout=1.5 must be at least 0 and less than 1'),
    ('--vocab_size 10', '--vocab_size 10: the data has'),
    ('--block_size 100000', 'fewer than block_size + 1 = 100001'),
    ('--optimizer sgd', '--optimizer sgd: choose one of adamw, muon'),
    ('--preset gpt5', '--preset gpt5: choose one of gpt2, palm'),
    ('--compile maybe', '--compile: maybe is neither True nor False'),
    ('--device cuda', '--device cuda: '),
    ('--init_from elsewhere/ckpt.pt', 'there is no checkpoint elsewhere/ckpt.pt'),
    ('--init_from resume', 'there is no checkpoint out/ckpt.pt'),
    ('--eval_only', 'there is no checkpoint out'),
    ('out', 'out belongs to no flag')])
def test_a_bad_command_line_is_one_line_that_names_what_is_wrong(data, tmp_path, monkeypatch, capsys, flags, named):
    """Exit status 2, no traceback, and nothing has been written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    words = flags.split()
    err = refused(words if '--dataset' in words else [*words, f'--dataset={data}'], capsys, monkeypatch)
    assert named in err, f'{err!r} does not say {named!r}'
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('flags, named', [
    ('--init_from resume --n_layer 3', '--n_layer 3: '), ('--init_from resume --n_embd 32', '--n_embd 32: '),
    ('--init_from ckpt.pt --norm rmsnorm', '--norm rmsnorm: '), ('--init_from . --vocab_size 999', '--vocab_size 999: '),
    ('--init_from resume --block_size 64', 'block_size 64'),
    ('--init_from resume --block_size 4', 'block_size 4'),  # its optimizer remembers 8 positions
    ('--init_from resume --optimizer muon', '--optimizer muon'), ('--init_from resume --dropout 1.5', 'dropout=1.5')])
def test_flags_that_contradict_a_checkpoint_are_refused(data, tmp_path, monkeypatch, capsys, flags, named):
    """The line names the flag; the checkpoint stays as it is."""
    fit(data, tmp_path, max_iters=1)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / 'ckpt.pt').read_bytes()
    capsys.readouterr()
    err = refused([*flags.split(), '--out_dir=.', '--max_iters=3'], capsys, monkeypatch)
    assert named in err, f'{err!r} does not say {named!r}'
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


@pytest.mark.parametrize('way', ['path', 'resume', 'eval_only'])
def test_a_checkpoint_and_data_of_another_tokenizer_are_refused(data, tmp_path, monkeypatch, capsys, way):
    """The same ids would mean other text: the line names the folder and the checkpoint."""
    # b6
    fit(data, tmp_path / 'out', max_iters=1)
    other = prepared(tmp_path / 'other', text=TEXT.replace('狐', '貓'))
    capsys.readouterr()
    flags = {'path': [f'--init_from={tmp_path}/out/ckpt.pt', f'--out_dir={tmp_path}/new'],
             'resume': ['--init_from=resume', f'--out_dir={tmp_path}/out'],
             'eval_only': ['--eval_only', f'--out_dir={tmp_path}/out']}[way]
    err = refused([*flags, f'--dataset={other}'], capsys, monkeypatch)
    assert f'{other} was encoded with another tokenizer than {tmp_path}/out' in err, err


def test_a_checkpoint_without_optimizer_cannot_be_resumed(data, tmp_path, monkeypatch, capsys):
    """best.pt copied over ckpt.pt: one line that says what is missing, not a KeyError."""
    fit(data, tmp_path, max_iters=1)
    (tmp_path / 'ckpt.pt').write_bytes((tmp_path / 'best.pt').read_bytes())
    capsys.readouterr()
    assert 'ckpt.pt' in refused(['--init_from=resume', f'--out_dir={tmp_path}', '--max_iters=3'], capsys, monkeypatch)


def test_half_a_checkpoint_is_one_line_of_the_real_command(data, tmp_path):
    """Truncated at any length; as a user sees it, with everything that Python and torch print by themselves."""
    fit(data, tmp_path / 'out', max_iters=1)
    whole = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    for n in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / 'half.pt').write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r'half\.pt is not a whole checkpoint'):
            models.load(str(tmp_path / 'half.pt'))
    (tmp_path / 'out' / 'ckpt.pt').write_bytes(whole[:len(whole) // 2])
    result = command('train.py', '--init_from', 'resume', cwd=tmp_path, status=2)
    assert result.stderr.startswith('train.py: error: out/ckpt.pt is not a whole checkpoint'), result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ''


@pytest.mark.parametrize('damage', ['meta', 'bin', 'json'])
def test_a_damaged_data_folder_is_named(data, tmp_path, damage):
    """Half a train.bin, or a meta.json that is not one, is found before training."""
    folder = Path(prepared(tmp_path / 'd', text=TEXT[:300]))
    if damage == 'bin':
        (folder / 'train.bin').write_bytes((folder / 'train.bin').read_bytes()[:-2])
    else:
        (folder / 'meta.json').write_text('{"counts": {"train": 3}}' if damage == 'meta' else '{"counts', encoding='utf-8')
    with pytest.raises(ValueError, match=re.escape(str(folder)) + '.*prepare the data again'):
        train.Data(str(folder), 'train')


def test_flags_may_be_written_in_any_common_way(data, tmp_path, capsys):
    """--a=1, --a 1, --a-b 1, --compile=False and --no-compile all work, in one command."""
    base = {key: value for key, value in TINY.items() if key != 'max_iters'}
    for i, words in enumerate(['--learning_rate=1 --dropout=0 --compile=False --max-iters 3',
                               '--learning-rate 1 --dropout 0.0 --no-compile --max_iters=3']):
        train.main([*(f'--{key}={value}' for key, value in base.items()), f'--dataset={data}', f'--out_dir={tmp_path}/{i}',
                    *words.split()])
    a, b = (read(tmp_path / name / 'ckpt.pt') for name in '01')
    assert different(a['model'], b['model']) == [] and a['step'] == 3
    assert {**a['settings'], 'out_dir': ''} == {**b['settings'], 'out_dir': ''}
    assert (a['settings']['learning_rate'], a['settings']['compile'], a['config']['dropout']) == (1.0, False, 0.0)


@pytest.mark.parametrize('moment', ['compiling', 'first call', 'end of the first backward'])
def test_torch_compile_that_fails_is_one_warning(data, tmp_path, monkeypatch, moment):
    """Without a C compiler, say, training goes on without it, and ends like one that never asked for it."""
    def fail():
        raise RuntimeError('no compiler found\nand more lines')

    def broken(model):
        if moment == 'compiling':
            fail()

        def call(**batch):
            if moment == 'first call':
                fail()
            loss = model(**batch)[1]
            return None, types.SimpleNamespace(backward=lambda: (loss.backward(), fail()))  # gradients stay behind
        return call

    monkeypatch.setattr(torch, 'compile', broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model, _ = fit(data, tmp_path / 'compiled', compile=True, dropout=0.2)
    texts = [str(w.message) for w in caught if 'compile' in str(w.message)]
    assert texts == ['torch.compile failed, going on without it (RuntimeError: no compiler found)'], texts
    assert different(model, fit(data, tmp_path / 'plain', compile=False, dropout=0.2)[0]) == []


def test_a_first_run_without_data_prepares_pydoc(tmp_path, monkeypatch, capsys):
    """`python train.py` on a fresh clone finds a data set; any other name must exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(prepare_data.DATASETS, 'pydoc', lambda mirror: TEXT)
    machine = train.Machine(train.Settings(device='cpu'))
    folder = train.find_dataset('pydoc', machine)
    assert len(train.Data(folder, 'train').tokens) > 100 and train.find_dataset('pydoc', machine) == folder
    assert capsys.readouterr().out.count('preparing') == 1


FLAGS = {
    'train.py': """
        dataset preset init_from out_dir eval_only objective batch_size gradient_accumulation_steps max_iters eval_interval
        eval_iters log_interval sample_tokens target_loss optimizer learning_rate muon_learning_rate min_lr warmup_iters
        lr_decay_iters lr_schedule weight_decay beta1 beta2 grad_clip seed device dtype compile backend
        arch vocab_size block_size n_layer n_head n_kv_head n_embd head_dim mlp_dim norm norm_eps norm_weight norm_first
        qk_norm parallel activation bias positions rope_theta scale_embedding scale_output tied logit_cap init dropout""",
    'sample.py': """
        start out_dir init_from num_samples max_new_tokens temperature top_k top_p stop seed stream score json device
        dtype""",
    'prepare_data.py': 'dataset input val task tokenizer vocab_size val_fraction out_dir mirror',
}
OF_SCRIPT = {'train.py': (train.main, train.Settings, models.Config), 'sample.py': (sample.main, sample.Settings),
             'prepare_data.py': (prepare_data.main, prepare_data.Settings)}


@pytest.mark.parametrize('script', FLAGS)
def test_no_flag_vanishes_unnoticed(script, capsys, monkeypatch):
    """The flags of a script are these, and --help shows each with a sentence, and ends with 0."""
    main, *classes = OF_SCRIPT[script]
    fields = [f for cls in classes for f in dataclasses.fields(cls)]
    assert sorted(f.name for f in fields) == sorted(FLAGS[script].split())
    monkeypatch.setattr(sys, 'argv', [script, '--help'])
    with pytest.raises(SystemExit) as e:
        prepare_data.run(main)
    shown = capsys.readouterr().out
    assert e.value.code == 0
    for f in fields:
        assert re.search(rf'^ +--{f.name} ', shown, re.MULTILINE) and f.metadata['help'], f'--help lacks --{f.name}'


def test_a_checkpoint_is_plain_data(data, tmp_path):
    """What sample.py and a resumed run need is in it, and opening it runs no code; settings survive JSON."""
    fit(data, tmp_path, max_iters=2)
    checkpoint = read(tmp_path / 'ckpt.pt')
    assert checkpoint.keys() == {'config', 'model', 'tokenizer', 'task', 'labels', 'step', 'best', 'seconds', 'settings',
                                 'optimizer', 'scaler'}
    for name in ('config', 'tokenizer', 'settings'):
        assert json.loads(json.dumps(checkpoint[name])) == checkpoint[name], name
    assert checkpoint['settings']['batch_size'] == 4 and checkpoint['step'] == 2

# -----------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_half_precision_trains_on_a_gpu(data, tmp_path, dtype, optimizer):
    """Weights stay float32 and finite, the loss falls, and a resumed run has the scaler of the unbroken one."""
    flags = dict(device='cuda', dtype=dtype, optimizer=optimizer, compile=False, max_iters=60, learning_rate=0.01)
    model, _ = fit(data, tmp_path / 'out', **flags)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    first, last = (float(row[2]) for row in log_rows(tmp_path / 'out')[1:])
    assert last < first - 0.3, f'{first} -> {last}'
    fit(data, tmp_path / 'broken', stop_at=31, **flags)
    fit(data, tmp_path / 'broken', init_from='resume')
    a, b = (read(tmp_path / name / 'ckpt.pt') for name in ('out', 'broken'))
    assert a['scaler'] == b['scaler'] and bool(a['scaler']) == (dtype == 'float16')


if __name__ == '__main__':  # one of the two processes
    train.OBJECTIVES['causal_lm'] = ragged
    train.Log.plot = lambda log: None
    torch.set_num_threads(1)
    result = many_runs(*sys.argv[1:])
    if os.environ['RANK'] == '0':
        torch.save(result, Path(sys.argv[2]) / 'found.pt')
    torch.distributed.destroy_process_group()
