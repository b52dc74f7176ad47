"""
train.py keeps its promises: a step means the same in any number of micro-batches and processes, a resumed run is the
unbroken one bit for bit, evaluation changes nothing, every window and every example is read once an epoch, BERT is asked
what its paper says, a trunk goes from one task to the next as it is, and what a user can get wrong is one line. Run under
torchrun, this file itself is one of two processes (see many_runs).
"""

import collections
import contextlib
import copy
import csv
import dataclasses
import errno
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
            eval_iters=2, eval_interval=1000, log_interval=1000, sample_tokens=0, max_iters=8, warmup_iters=2, dropout=0.0,
            optimizer='adamw', learning_rate=2e-3, seed=5)  # whatever the recipes say
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


def pages(*documents):
    """Documents of sentences, a line each."""
    return '<|endoftext|>\n'.join(''.join(f'{sentence}\n' for sentence in document) for document in documents)


BOOKS = [[f'{name} 犬 {n * n}', *(f'{name} {i} 🦊' for i in range(n))]
         for n, name in enumerate(['Ann', 'e\u0301', '春夏', 'Zoë'], 2)]


def labelled(folder, task, n=24, block_size=32):
    """A data folder of n made-up rows of a task, the same to train and to validate, of 12 to 30 bytes each."""
    rows = [(i, ['Ann', 'Lee 春'][i % 2], 'x' * (i % 7)) for i in range(n)]
    if task == 'classify':
        text = '\n'.join([f'{["bad", "好"][i % 2]}\t{i} {name} {x}' + i % 3 % 2 * '\tfilm' for i, name, x in rows])
    elif task == 'tag':
        text = '\n\n'.join([f'{i}{x} O\nAnn B-name\n{["naps O", "Lee I-name"][i % 2]}\n犬 O' for i, _, x in rows])
    else:
        text = json.dumps({'data': [{'paragraphs': [{'context': f'{i}{x} {name} 犬', 'qas': [
            {'id': i, 'question': 'who', 'answers': [{'text': name, 'answer_start': len(f'{i}{x} ')}]}]}]}
                                    for i, name, x in rows]})
    folder.with_suffix('.rows').write_text(text, encoding='utf-8', newline='\n')
    prepare_data.prepare(prepare_data.Settings(
        task=task, input=[f'{folder}.rows'], val=[f'{folder}.rows'], tokenizer='byte', block_size=block_size,
        out_dir=str(folder)))
    return str(folder)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """d: characters of one document; text: bytes of several; classify, tag, qa: labelled, in the same bytes."""
    root = tmp_path_factory.mktemp('data')
    prepared(root / 'd')
    prepared(root / 'text', pages(*BOOKS), pages(*BOOKS[:2]), tokenizer='byte')
    for task in models.TASKS:
        labelled(root / task, task)
    return root


@pytest.fixture(scope='module')
def data(folders):
    return str(folders / 'd')


WIDE = dict(block_size=32)  # what the labelled examples, and two texts, fit into


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


def ragged(data, rows, block_size):
    """An objective whose examples differ in length and in how many targets they ask; every fifth asks none."""
    examples = train.causal_lm(data, rows, block_size)
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
        e, = train.OBJECTIVES[objective](text, [row], 8)
        targets = torch.tensor(e['targets'])
        nats = nats + F.cross_entropy(plain(torch.tensor(e['ids'])[None])[0][0], targets, reduction='sum')
        asked += int((targets != models.IGNORE).sum())
    expected = nats / max(1, asked)
    expected.backward()
    assert [loss.item() for loss in losses] == pytest.approx([expected.item()] * 2, rel=1e-5), (losses, expected)
    for (name, p), q, r in zip(cut[0].named_parameters(), big[0].parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=2e-6, msg=lambda m: f'{name}, cut and whole: {m}')
        torch.testing.assert_close(p.grad, r.grad, rtol=1e-4, atol=2e-6, msg=lambda m: f'{name}, by hand: {m}')


@settings(max_examples=12)
@given(k=st.integers(1, 3), n=st.integers(1, 4), step=st.integers(0, 30),
       what=st.sampled_from([('text', 'bert'), ('d', 'bert'), ('classify', 'bert'), ('classify', 'gpt2'), ('tag', 'llama'),
                             ('tag', 'bert'), ('qa', 'lstm'), ('qa', 'bert')]))
@example(k=3, n=2, step=1, what=('text', 'bert'))
@example(k=2, n=3, step=0, what=('tag', 'bert'))
def test_whatever_is_asked_the_loss_is_a_mean_over_all_that_is_asked(folders, k, n, step, what):
    """Hidden tokens, whether B follows, labels, tags, spans: each part is averaged over the whole step, padding or not."""
    # b1, with rows of unequal numbers of targets; b3
    dataset, preset = what
    flags = {**TINY, **WIDE, 'dataset': str(folders / dataset), 'preset': preset, 'gradient_accumulation_steps': k,
             'batch_size': n}
    model, s, tokenizer, text, _, _, machine = train.start(flags)
    alone = copy.deepcopy(model)
    loss = train.gradient(step, model, model, text, s, machine, tokenizer._special_tokens['[PAD]'])
    rows, parts = range(step * k * n, (step + 1) * k * n), collections.defaultdict(list)
    for e in train.OBJECTIVES[s.objective](text, rows, 32):  # one example at a time: no padding
        batch = sample.collate([e], 0)
        for name in [key for key in batch if key.endswith('targets')]:
            one = {key: t for key, t in batch.items() if key == name or not key.endswith('targets')}
            nats = alone(**one, counts={name: 1})[1]
            parts[name].append((nats, (batch[name] != models.IGNORE).sum()))
    expected = sum(sum(nats for nats, _ in found) / sum(asked for _, asked in found) for found in parts.values())
    expected.backward()
    assert set(parts) == {'targets'} | ({'next_targets'} if dataset == 'text' else set())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for (name, p), q in zip(model.named_parameters(), alone.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=lambda m: f'{name}: {m}')


@pytest.mark.parametrize('preset, dataset', [('bert', 'text'), ('bert', 'classify'), ('gpt2', 'tag'), ('llama', 'd')])
def test_adversarial_training_adds_the_gradient_where_the_embedding_hurts_most(folders, tmp_path, preset, dataset):
    """g(w) + g(w + eps g / |g|), over all micro-batches; the embedding is back bit for bit, the loss is that of w."""
    flags = {**TINY, **WIDE, 'dataset': str(folders / dataset), 'preset': preset, 'gradient_accumulation_steps': 2,
             'adversarial': 0.7}
    model, s, tokenizer, text, _, _, machine = train.start(flags)
    before = copy.deepcopy(model.state_dict())
    calm, pad = dataclasses.replace(s, adversarial=0.0), tokenizer._special_tokens['[PAD]']

    def gradients(model, s):
        model.zero_grad()
        loss = train.gradient(0, model, model, text, s, machine, pad)
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    by_hand = copy.deepcopy(model)
    loss, here = gradients(by_hand, calm)
    weight = next(p for name, p in by_hand.named_parameters() if name.endswith('tokens.weight'))
    g = weight.grad.clone()
    weight.data += 0.7 * g / (g ** 2).sum().sqrt()
    worse, there = gradients(by_hand, calm)
    found_loss, found = gradients(model, s)
    assert different(model, before) == [], 'the embedding did not come back'
    assert worse > loss and found_loss == loss, f'{found_loss}: {loss} became {worse}'
    assert found.keys() == here.keys()
    for name in found:
        torch.testing.assert_close(found[name], here[name] + there[name], rtol=1e-4, atol=1e-7, msg=lambda m: f'{name}: {m}')


def test_the_embedding_stays_where_its_gradient_is_zero():
    """No direction hurts: 0 / 0 would be no number."""
    model = models.build(dataclasses.replace(models.PRESETS['gpt2'], vocab_size=5, n_layer=1, n_embd=4, n_head=1))
    model.tokens.weight.grad, before = torch.zeros_like(model.tokens.weight), model.tokens.weight.detach().clone()
    with train.moved_embedding(model, 0.5):
        assert torch.equal(model.tokens.weight, before)


@pytest.mark.parametrize('dataset, preset, what, still', [
    ('classify', 'bert', 'trunk', r'trunk\.'), ('tag', 'gpt2', 'trunk', r'trunk\.'), ('qa', 'lstm', 'trunk', r'trunk\.'),
    ('classify', 'bert', 'embeddings', r'trunk\.(tokens|encoder\.embed|output\.weight)'),
    ('tag', 'llama', 'embeddings', r'trunk\.(tokens|decoder\.embed)'), ('classify', 'lstm', 'embeddings', r'trunk\.tokens'),
    ('text', 'bert', 'embeddings', r'(tokens|encoder\.embed|output\.weight)'),
    ('text', 'gpt2', '0', r'(tokens|decoder\.embed|output\.weight)'),
    ('text', 'gpt2', '1', r'(tokens|decoder\.embed|decoder\.blocks\.0|output\.weight)'),
    ('qa', 'bert', '1', r'trunk\.(tokens|encoder\.embed|encoder\.blocks\.0|output\.weight)'),
    ('qa', 'bert', '2', r'trunk\.(tokens|encoder\.embed|encoder\.blocks|output\.weight)')])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_what_is_frozen_stays_bit_for_bit_and_all_else_learns(folders, tmp_path, dataset, preset, what, still, optimizer):
    """Neither a gradient nor weight decay reaches it; everything that the loss depends on besides has moved."""
    flags = dict(WIDE, preset=preset, n_layer=2, weight_decay=0.5, optimizer=optimizer, max_iters=2)
    model, _ = fit(str(folders / dataset), tmp_path / 'frozen', freeze=what, **flags)
    start, _ = fit(str(folders / dataset), tmp_path / 'start', **{**flags, 'max_iters': 0})
    free, _ = fit(str(folders / dataset), tmp_path / 'free', **flags)
    expected = {name for name in different(free, start) if not re.match(still, name)}
    assert expected and set(different(model, start)) == expected
    assert any(re.match(still, name) for name in different(free, start)), 'it would not have moved anyway'


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


def many_runs(folders, out):
    """
    What one process and two must agree on. Called here for one, and by each of two under torchrun. Text is learned by the
    ragged objective, so that ranks have unequally many targets.
    """
    folder = f'{folders}/d'
    rank, last = (int(os.environ.get(name, default)) for name, default in (('RANK', 0), ('WORLD_SIZE', 1)))
    found = {}
    bert = dict(WIDE, preset='bert', batch_size=6)
    for name, flags in {
        'micro-batches dealt out': dict(batch_size=3, gradient_accumulation_steps=4),
        'one micro-batch each, clipped': dict(batch_size=3, gradient_accumulation_steps=2, grad_clip=0.05),
        'micro-batches sliced, clipped': dict(batch_size=4, gradient_accumulation_steps=3, grad_clip=0.05),
        'one micro-batch sliced, Muon': dict(batch_size=6, gradient_accumulation_steps=1, optimizer='muon'),
        'masked, with pairs': dict(bert, dataset=f'{folders}/text', gradient_accumulation_steps=2),
        'masked, without': dict(bert, objective='masked_lm'),
        'texts, the embedding moved': dict(bert, dataset=f'{folders}/classify', gradient_accumulation_steps=3,
                                           adversarial=0.5),
        'tags, a trunk frozen': dict(WIDE, dataset=f'{folders}/tag', gradient_accumulation_steps=2, freeze='trunk'),
    }.items():
        with recorded_norms() as norms:
            model, state = fit(folder, f'{out}/{name}', max_iters=4, eval_iters=3, eval_interval=2, **flags)
        found[name] = {**model.state_dict(), 'norms': torch.tensor(norms), 'best': torch.tensor(state['best'])}

    model, s, _, _, val, _, machine = train.start({**TINY, 'dataset': folder, 'preset': 'llama'})
    tokens, losses = val.tokens, {}
    for n in (len(tokens), 100, 9, 5):  # uneven; and too few for the second process to have any  (b17: a deadlock)
        val.tokens = tokens[:n]
        losses[f'whole split of {n}'] = torch.tensor(list(train.evaluate(model, val, s, machine).values()))
    val.tokens, mine = tokens, []
    model.register_forward_hook(lambda *args: mine.append(1))
    for s.eval_iters in (1, 2, 3):
        losses[f'estimate by {s.eval_iters}'] = torch.tensor(train.estimate(model, model, val, s, machine, 0)['loss'])
    model, s, _, _, val, _, machine = train.start({**TINY, **bert, 'dataset': f'{folders}/text'})
    for n in (1, 7, 20):  # one row; and uneven parts
        losses[f'{n} masked rows'] = torch.tensor(list(train.masked_scores(model, val, n, s, machine).values()))
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


def test_two_processes_train_and_evaluate_and_resume_like_one(folders, tmp_path, monkeypatch):
    """Same weights, gradient lengths and losses up to rounding; and two that are stopped go on bit for bit."""
    # b1: under no_sync only backward, clipping before the sum, the mean of the ranks' means; b17: uneven validation
    monkeypatch.setitem(train.OBJECTIVES, 'causal_lm', ragged)
    torchrun(__file__, folders, tmp_path / 'two', cwd=tmp_path)
    one, alone = many_runs(folders, tmp_path / 'one')
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


@pytest.mark.parametrize('dataset, preset, optimizer, dtype, stop_at, more', [
    ('d', 'gpt2', 'adamw', 'float32', 1, {}), ('d', 'gpt2', 'muon', 'float32', 5, {}),
    ('d', 'palm', 'adamw', 'bfloat16', 3, {}), ('d', 'llama', 'muon', 'float32', 4, {}),
    ('d', 'nano', 'muon', 'float32', 2, {}), ('d', 'lstm', 'adamw', 'float32', 7, {}),
    ('d', 'lstm', 'muon', 'float32', 3, {}), ('d', 'gpt2', 'adamw', 'float16', 3, {}),
    ('d', 'nano', 'muon', 'float16', 5, {}), ('d', 'bert', 'adamw', 'float32', 3, {}),
    ('text', 'bert', 'muon', 'float32', 5, {}), ('text', 'bert', 'adamw', 'float16', 3, {'adversarial': 0.1}),
    ('classify', 'bert', 'adamw', 'float32', 4, {'freeze': '1'}), ('classify', 'gpt2', 'muon', 'float32', 2, {}),
    ('tag', 'lstm', 'adamw', 'float32', 5, {'freeze': 'trunk'}), ('qa', 'bert', 'muon', 'float32', 3, {'adversarial': 0.1}),
    ('qa', 'llama', 'adamw', 'bfloat16', 3, {}),
    ('classify', 'lstm', 'adamw', 'float32', 2, {'batch_size': 5})])  # of 24: an epoch begins within a batch
def test_a_resumed_run_is_the_unbroken_run(folders, tmp_path, dataset, preset, optimizer, dtype, stop_at, more):
    """Weights, optimizers, scaler and log are the same bit for bit, with dropout, in the middle of an epoch."""
    # b17: random numbers, data position or scaler not restored
    flags = dict(preset=preset, optimizer=optimizer, dtype=dtype, dropout=0.2, n_layer=2, eval_interval=3,
                 gradient_accumulation_steps=2, block_size=8 if dataset == 'd' else 32, **more)
    data = str(folders / dataset)
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
        assert a['state'].keys() == b['state'].keys()
        for p in a['state']:
            assert all(map(torch.equal, a['state'][p], b['state'][p])), f'optimizer state of parameter {p}'
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
    latest, before = (tmp_path / 'out' / name for name in ('ckpt.pt', 'ckpt.prev.pt'))
    step = read(latest if latest.exists() else before)['step']  # it may die between the two renames of a save
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
    signals = train.Signals()
    signals.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert (signals.caught, left) == (signal.SIGTERM, [])
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
    found = train.Text(data, split, seed)
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


@pytest.mark.parametrize('preset, split, at', [('gpt2', 'train', 0), ('gpt2', 'train', 8), ('gpt2', 'val', 3),
                                               ('bert', 'train', 0), ('bert', 'train', 7), ('bert', 'val', 3)])
def test_an_id_outside_the_vocabulary_is_named(tmp_path, preset, split, at):
    """Also where only a target has it: never a wrong row, never an index error without a name."""
    # b6
    folder = prepared(tmp_path / 'd', text='abcdefgh', val='hgfedcba')  # 8 + <|endoftext|>: one window
    bad = prepare_data.read_json(f'{folder}/meta.json')['vocab_size']
    with_bad_id(folder, split, at)
    with pytest.raises(ValueError, match=f'{re.escape(folder)}.* holds the id {bad} in {split}'):
        fit(folder, tmp_path / 'out', preset=preset)
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()


def test_eval_only_names_an_id_outside_the_vocabulary_too(tmp_path):
    """The whole split is checked as a batch is."""
    # b6
    folder = prepared(tmp_path / 'd', text='abcdefgh' * 9, val='hgfedcba' * 9)
    fit(folder, tmp_path / 'out', max_iters=0)
    with_bad_id(folder, 'val', 70)
    with pytest.raises(ValueError, match=r'holds the id \d+ in val'):
        train.main([f'--out_dir={tmp_path}/out', '--eval_only'])


def test_memory_does_not_grow_with_the_batches(data, tmp_path):
    """Reading all over a large file leaves no trace: anonymous memory stays, whatever of the file the kernel keeps."""
    # b6: a memmap that copies, or arrays that are kept. Coarse: 40 MB of batches may add 8 MB
    status = Path('/proc/self/status')
    if not status.exists():
        return  # only Linux tells
    np.memmap(tmp_path / 'large.bin', 'uint16', mode='w+', shape=2 ** 25).flush()  # 64 MB, sparse
    text = train.Text(data, 'train')
    text.tokens = np.memmap(tmp_path / 'large.bin', 'uint16', mode='r')

    def megabytes():
        return int(re.search(r'RssAnon:\s+(\d+)', status.read_text())[1]) / 1024

    for i in range(10):
        train.get_batch(text, 'causal_lm', 1024, 16 * i, 16)
    before = megabytes()
    for i in range(10, 170):
        train.get_batch(text, 'causal_lm', 1024, 16 * i, 16)
    assert megabytes() - before < 8, f'{before:.0f} MB became {megabytes():.0f} MB'


@pytest.mark.parametrize('cycle', ['abc', '春夏秋冬', 'a\u0301e\u0300🌸🦊'])
def test_a_cycle_is_learned_and_continued(tmp_path, cycle):
    """A text in which each character tells the next is predicted almost surely, and greedy writing goes on with it."""
    # b4: with a double shift the loss falls just as well, but the text that comes out skips characters
    folder = prepared(tmp_path / 'd', text=cycle * 120)
    model, _ = fit(folder, tmp_path / 'out', preset='llama', max_iters=80, learning_rate=0.02)
    nats = slow_nats(model, train.Text(folder, 'val').tokens[:-1], 8)  # the last is <|endoftext|>, never seen in training
    assert np.mean(nats) < 0.1, np.mean(nats)
    tokenizer = prepare_data.load_tokenizer(folder)
    greedy = sample.Settings(temperature=0, max_new_tokens=9, seed=0)
    text = ''.join(text for _, text in sample.write(model.eval(), tokenizer, cycle[:2], greedy))
    assert cycle[:2] + text == (cycle * 9)[:11]

# -----------------------------------------------------------------------------
# What BERT is asked

def numbered(folder, split='train', seed=0):
    """A Text whose every token but <|endoftext|> has an id of its own: the size of the vocabulary + where it stands."""
    text = train.Text(str(folder), split, seed)
    end, V, n = text.tokenizer._special_tokens['<|endoftext|>'], text.vocab_size, len(text.tokens)
    text.tokens, text.vocab_size = np.where(text.tokens == end, end, V + np.arange(n)), V + n
    return text


def unmasked(example):
    """The ids as they were before some were hidden."""
    return np.where(example['targets'] == models.IGNORE, example['ids'], example['targets'])


def plain(examples):
    return [{key: np.asarray(value).tolist() for key, value in e.items() if key != 'about'} for e in examples]


def sigmas(n, of, p):
    """How far n hits of `of` are from their mean, in standard deviations of a binomial distribution."""
    return abs(n - of * p) / math.sqrt(of * p * (1 - p))


@given(documents=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=2, max_size=5).filter(
    lambda documents: max(map(len, documents)) > 1), T=st.integers(8, 40), seed=st.integers(0, 3))
@example(documents=[[1, 1], [1]], T=8, seed=0)
@example(documents=[[9, 9, 9], [9, 9]], T=8, seed=0)
def test_a_row_of_masked_lm_is_two_runs_of_sentences_in_their_frame(tmp_path, documents, T, seed):
    """[CLS] A [SEP] B [SEP]: A ends where a sentence ends; B is what comes next, or begins in another document."""
    # b8: B from the same document; a label that means the opposite; a last [SEP] that truncation cuts off
    folder = prepared(tmp_path / 'd', pages(*(['犬' * n for n in lengths] for lengths in documents)), val=pages('ab', 'cd'))
    text, starts, document, ends, place = numbered(folder, seed=seed), [], [], [], 0
    for d, lengths in enumerate(documents):  # a line of n + 1 characters each, then <|endoftext|>
        for n in lengths:
            starts.append(place)
            document.append(d)
            place += n + 1
        ends.append(place)
        place += 1
    V, special, room = text.vocab_size - len(text.tokens), text.tokenizer._special_tokens, T - 3
    for e in train.masked_lm(text, range(20), T):
        ids = unmasked(e)
        seps = np.flatnonzero(ids == special['[SEP]'])
        assert ids[0] == special['[CLS]'] and len(seps) == 2 and seps[1] == len(ids) - 1 and len(ids) <= T, ids
        assert e['segments'] == [0] * (seps[0] + 1) + [1] * (seps[1] - seps[0]), e['segments']
        a, b = ids[1:seps[0]] - V, ids[seps[0] + 1:-1] - V                             # where each token stands
        assert len(a) and len(b) and (np.diff(a) == 1).all() and (np.diff(b) == 1).all() and min(a[0], b[0]) >= 0, (a, b)
        next_one = starts.index(a[-1] + 1)  # the sentence behind A
        of_a, of_b = document[next_one], document[starts.index(b[0])]
        assert a[0] >= starts[document.index(of_a)], f'A {a} begins in the document before'
        assert a[0] in starts or room // 4 <= len(a) <= room // 4 + room // 2, f'A {a} is cut to another length'
        assert len(b) == min(room - len(a), ends[of_b] - b[0]), f'B {b} is cut for no reason'
        if e['next_targets'] == train.IS_NEXT == 1:
            assert b[0] == a[-1] + 1, f'{b} does not follow {a}'
        else:
            assert e['next_targets'] == 0 and of_a != of_b, f'{a} and {b} are of one document'
        assert (e['targets'] != models.IGNORE).sum() == max(1, round(0.15 * (len(a) + len(b)))), e['targets']


def test_half_of_the_pairs_follow_and_the_others_begin_anywhere_in_other_documents(tmp_path):
    """Both labels are equally frequent, whatever A is; a wrong B is any sentence of any other document, equally often."""
    # b8
    folder = prepared(tmp_path / 'd', pages(['one', 'four', 'a'], ['alone'], ['xy', 'e\u0301🦊']), val=pages('ab', 'cd'))
    text = numbered(folder)
    V, (starts, document, _) = text.vocab_size - len(text.tokens), text.sentences
    end = text.tokenizer._special_tokens['[SEP]']
    assert document.tolist() == [0, 0, 0, 1, 2, 2]
    firsts, wrong = collections.Counter(), collections.Counter()
    for e in train.masked_lm(text, range(4000), 16):
        ids = unmasked(e)
        sep = ids.tolist().index(end)
        a, b = document[starts.tolist().index(ids[sep - 1] - V + 1)], starts.tolist().index(ids[sep + 1] - V)
        firsts[a, e['next_targets']] += 1
        if not e['next_targets']:
            wrong[a, b] += 1
    assert set(firsts) == {(0, 0), (0, 1), (2, 0), (2, 1)}, firsts
    assert sigmas(firsts[0, 0] + firsts[0, 1], 4000, 2 / 3) < 4.5, firsts
    for a, others in ((0, [3, 4, 5]), (2, [0, 1, 2, 3])):
        of = firsts[a, 0]
        assert sigmas(of, of + firsts[a, 1], 0.5) < 4.5, f'{firsts} are not balanced'
        assert all(sigmas(wrong[a, b], of, 1 / len(others)) < 4.5 for b in others), wrong
    assert set(wrong) == {(0, b) for b in (3, 4, 5)} | {(2, b) for b in (0, 1, 2, 3)}, wrong


def test_a_document_that_the_split_cuts_is_read_to_its_last_token_and_from_its_first(tmp_path):
    """No <|endoftext|> closes it in train, and val begins with its other half: neither loses a token to B's end."""
    (tmp_path / 'text').write_text(pages(['one', 'two'], [f'{i} 狐狸' for i in range(8)], ['y', 'z']), encoding='utf-8')
    prepare_data.prepare(prepare_data.Settings(input=[f'{tmp_path}/text'], tokenizer='char', val_fraction=0.5,
                                               out_dir=f'{tmp_path}/d'))
    for split, edge in (('train', -1), ('val', 0)):
        text = numbered(tmp_path / 'd', split)
        assert text.counts['documents'] == 2, text.counts
        end = text.tokenizer._special_tokens['<|endoftext|>']
        rows = [unmasked(e) for e in train.masked_lm(text, range(200), 64)]
        assert text.tokens[edge] != end and any(text.tokens[edge] in row for row in rows), f'{split} loses a token'
        assert not any(end in row for row in rows), split


@pytest.mark.parametrize('begin', ['\n', '  ', '\u3000\n'])
def test_no_text_goes_on_behind_the_end_of_a_document(tmp_path, begin):
    """Also where the next document begins with white space: <|endoftext|> stands in no row, and nothing behind it."""
    text = ('One a. Two b.\nThree c.\n<|endoftext|>\n' + begin) * 4 + 'Four.'
    text = train.Text(prepared(tmp_path / 'd', text, val=pages('ab', 'cd')), 'train')
    end = text.tokenizer._special_tokens['<|endoftext|>']
    rows = [unmasked(e).tolist() for e in train.masked_lm(text, range(50), 64)]
    assert not any(end in row for row in rows), next(row for row in rows if end in row)


def test_15_percent_are_asked_and_of_those_80_show_a_mask_and_10_another_token(folders):
    """[MASK] 80 %, another text token 10 %, itself 10 %: by binomial bounds; never a special token, anywhere in a text."""
    # b7: special tokens hidden, drawn as the other token, or none hidden at all; labels that change with the ids
    text, counts, early, others, places = numbered(folders / 'text'), collections.Counter(), 0, set(), collections.Counter()
    V, special = text.vocab_size - len(text.tokens), set(text.tokenizer._special_tokens.values())
    for e in train.masked_lm(text, range(3000), 32):
        ids, original, asked = e['ids'], unmasked(e), e['targets'] != models.IGNORE
        real = ~np.isin(original, list(special))
        assert not (asked & ~real).any() and (original[real] >= V).all(), f'{original}, asked {asked}'
        assert asked.sum() == max(1, round(0.15 * real.sum())), f'{asked.sum()} of {real.sum()}'
        kept, masked = ids == original, ids == text.tokenizer._special_tokens['[MASK]']
        assert kept[~asked].all(), 'a token changed that is not asked for'
        other = asked & ~kept & ~masked
        others |= set(ids[other].tolist())
        counts += collections.Counter(asked=int(asked.sum()), masked=int(masked.sum()), kept=int(kept[asked].sum()),
                                      other=int(other.sum()))
        n = real.sum()
        early += int(asked[real][:n // 2].sum())
        places += collections.Counter(half=int(asked[real][:n // 2 * 2].sum()))
    assert not others & special, f'special tokens {others & special} in the place of text'
    assert len(others) > 0.4 * len(text.text_ids), f'only {len(others)} of {len(text.text_ids)} others'
    assert min(others) < V and max(others) > text.vocab_size - 20, 'not from all of the vocabulary'
    for name, share in (('masked', 0.8), ('other', 0.1), ('kept', 0.1)):
        assert sigmas(counts[name], counts['asked'], share) < 4.5, f'{name}: {counts}'
    assert sigmas(early, places['half'], 0.5) < 4.5, f'{early} of {places["half"]} in the first half'


@given(what=st.sampled_from(['text', 'd', 'classify', 'tag']), first=st.integers(0, 500), n=st.integers(2, 9),
       cut=st.integers(1, 8))
@example(what='text', first=0, n=8, cut=4)
def test_rows_are_the_same_however_they_are_shared(folders, what, first, n, cut):
    """Eight rows are two times four, and eight times one, whatever was read before: for any number of processes."""
    cut, T = min(cut, n - 1), 32
    fresh = lambda seed=3: train.open_data(str(folders / what), 'train', seed)
    whole, used = plain(train.masked_lm(fresh(), range(first, first + n), T)), fresh()
    later = plain(train.masked_lm(used, range(first + cut, first + n), T))
    assert plain(train.masked_lm(used, range(first, first + cut), T)) + later == whole
    assert [plain(train.masked_lm(used, range(row, row + 1), T))[0] for row in range(first, first + n)] == whole
    assert plain(train.masked_lm(fresh(4), range(first, first + n), T)) != whole, 'another seed, the same rows'
    assert len({json.dumps(row) for row in whole}) == n, 'a row came twice'


@given(first=st.integers(0, 10 ** 9), rows=st.integers(2, 9), cut=st.integers(1, 8), n=st.integers(1, 13))
def test_uniforms_belong_to_their_row(data, first, rows, cut, n):
    """n numbers in [0, 1) a row, the same from wherever one begins, and no number is ever used twice."""
    cut, fresh = min(cut, rows - 1), lambda *about: train.Text(data, *about)
    whole = fresh('train', 1).uniforms(range(first, first + rows), n)
    parts = [fresh('train', 1).uniforms(rows, n) for rows in (range(first, first + cut), range(first + cut, first + rows))]
    assert whole.shape == (rows, n) and 0 <= whole.min() and whole.max() < 1
    assert (np.concatenate(parts) == whole).all()
    others = [fresh(*about).uniforms(range(first, first + rows), n) for about in (('train', 2), ('val', 1))]
    assert len(np.unique([whole, *others])) == 3 * rows * n, 'rows, seeds or splits share numbers'


@pytest.mark.parametrize('documents', [[[f'{i} 犬 one' for i in range(30)]], [[f'{i} two 🦊'] for i in range(30)]],
                         ids=['one document', 'one sentence each'])
def test_text_without_pairs_is_one_window_a_row_and_that_is_said_once(tmp_path, documents, capsys):
    """[CLS] window [SEP], every window once an epoch, nothing asked about B, and <|endoftext|> is never asked for."""
    # b8: a loader that misreads the documents trains on labels that are all equal
    folder = prepared(tmp_path / 'd', pages(*documents), val=pages(*BOOKS))
    text = numbered(folder)
    V, special, n = text.vocab_size - len(text.tokens), text.tokenizer._special_tokens, (len(text.tokens) - 1) // 10 - 1
    starts = []
    for e in train.masked_lm(text, range(2 * n), 12):
        ids = unmasked(e)
        real = ids >= V
        assert set(e) == {'ids', 'segments', 'targets'} and list(e['segments']) == [0] * 12
        assert (ids[0], ids[-1]) == (special['[CLS]'], special['[SEP]'])
        assert set(ids[~real]) <= {special[name] for name in ('[CLS]', '[SEP]', '<|endoftext|>')}, ids
        begins = set((ids - V - np.arange(-1, 11))[real])
        assert len(begins) == 1, f'{ids - V} is not one window'
        starts += begins
        asked = e['targets'] != models.IGNORE
        assert asked.sum() == max(1, round(0.15 * real.sum())) and real[asked].all()
    for epoch in (starts[:n], starts[n:]):
        assert np.diff(sorted(epoch)).tolist() == [10] * (n - 1), sorted(epoch)
    train.main([*(f'--{key}={value}' for key, value in {**TINY, 'max_iters': 1}.items()), '--preset=bert',
                f'--dataset={folder}', f'--out_dir={tmp_path}/out'])
    assert capsys.readouterr().out.count('trained without the question whether the second text follows') == 1


def test_text_with_pairs_says_nothing_about_their_lack(folders, tmp_path, capsys):
    """Only what is missing is said."""
    train.main([*(f'--{key}={value}' for key, value in {**TINY, **WIDE, 'max_iters': 1}.items()), '--preset=bert',
                f'--dataset={folders}/text', f'--out_dir={tmp_path}'])
    out = capsys.readouterr().out
    assert 'trained without' not in out and 'next sentence accuracy' in out, out


@pytest.mark.parametrize('task', models.TASKS)
def test_labelled_data_can_be_read_as_text(folders, task):
    """Each example once an epoch with tokens hidden, framed as it was, and no question about B."""
    examples = train.Examples(str(folders / task), 'train')
    found = train.masked_lm(examples, range(24), 32)
    assert all(set(e) == {'ids', 'segments', 'targets'} for e in found)
    made = [(e['ids'], e.get('segments', [0] * len(e['ids']))) for e in examples]
    assert sorted((unmasked(e).tolist(), list(e['segments'])) for e in found) == sorted(made)


def test_a_batch_of_masked_lm_is_learned_by_heart(folders):
    """Hidden tokens and both answers about B: the loss of one batch goes to almost nothing, and no answer stays wrong."""
    # b8: an ignored class 0 would leave half of the pairs wrong; b3, since the rows are padded
    text = train.Text(str(folders / 'text'), 'train')
    batch = train.get_batch(text, 'masked_lm', 32, 0, 12, text.tokenizer._special_tokens['[PAD]'])
    assert 'keep' in batch and set(batch['next_targets'].tolist()) == {0, 1}
    model = models.build(dataclasses.replace(models.PRESETS['bert'], vocab_size=text.vocab_size, block_size=32, n_layer=1,
                                             n_embd=32, n_head=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    for _ in range(120):
        logits, loss = model(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    follows = model.follows(model.hidden(batch['ids'], batch['keep'], batch['segments']), batch['keep']).argmax(dim=1)
    assert loss < 0.3 and follows.tolist() == batch['next_targets'].tolist(), (loss, follows, batch['next_targets'])
    assert (logits.argmax(dim=1) == batch['targets'][batch['targets'] != models.IGNORE]).all()

# -----------------------------------------------------------------------------
# Labelled examples


def first_of(folder, n, size, seed=3, split='train'):
    """The first n examples of a folder, read in batches of `size`."""
    data = train.Examples(str(folder), split, seed)
    data.places, data.lengths, data.batch_size = data.places[:n], data.lengths[:n], size
    return data


@given(n=st.integers(1, 24), size=st.integers(1, 30), epochs=st.integers(1, 4),
       rows=st.lists(st.integers(0, 99), max_size=9))
def test_an_epoch_takes_every_example_once_in_an_order_of_its_own(folders, n, size, epochs, rows):
    """In batches of any size, also larger than the data; and row i is the same example whatever was read before."""
    # b17
    order = lambda data, rows: [e['about']['row'] for e in train.supervised(data, rows, 32)]
    used = first_of(folders / 'classify', n, size)
    orders = [order(used, range(i * n, (i + 1) * n)) for i in range(epochs)]
    assert all(sorted(order) == list(range(n)) for order in orders), orders
    assert n < 12 or len({tuple(order) for order in orders}) == epochs, 'the same order twice'
    assert order(used, rows) == [order(first_of(folders / 'classify', n, size), [row])[0] for row in rows]
    others = [order(first_of(folders / 'classify', n, size, *about), range(n)) for about in ((4, 'train'), (3, 'val'))]
    assert n < 12 or (orders[0] not in others and others[0] != others[1]), 'seeds or splits share an order'


def test_a_batch_size_counts_from_when_it_is_set(folders):
    """A row is the same example for whoever asks, also for one who asked in batches of another size before."""
    # b17
    used, fresh = first_of(folders / 'tag', 24, 4), first_of(folders / 'tag', 24, 6)
    used.examples_of(range(4))
    used.batch_size = 6
    assert [e['about'] for e in used.examples_of(range(24))] == [e['about'] for e in fresh.examples_of(range(24))]


@pytest.fixture(scope='module')
def unequal(tmp_path_factory):
    """192 examples to classify and 192 pairs, of 8 to 223 tokens; a target is shorter or longer than its source."""
    root = tmp_path_factory.mktemp('unequal')
    sizes = [i * 37 % 214 for i in range(214)]
    rows = {'classify': [f'{"ab"[i % 2]}\t{"x" * (8 + n)}\n' for i, n in enumerate(sizes)],
            'seq2seq': [f'{"长" * 2}{"x" * (2 + n)}\t{"y" * (1 + n * (3 + i % 3) // 4)}\n' for i, n in enumerate(sizes)]}
    for task, lines in rows.items():
        (root / f'{task}.tsv').write_text(''.join(lines), encoding='utf-8')
        prepare_data.prepare(prepare_data.Settings(task=task, input=[f'{root}/{task}.tsv'], tokenizer='byte',
                                                   block_size=320, out_dir=f'{root}/{task}'))
    return root


@pytest.mark.parametrize('task', ['classify', 'seq2seq'])
@settings(max_examples=12)
@given(n=st.integers(1, 192), size=st.integers(1, 40), epochs=st.integers(1, 4))
@example(192, 16, 2)
@example(191, 40, 4)
@example(7, 8, 4)
def test_the_batches_of_an_epoch_hold_examples_of_about_one_length(unequal, task, n, size, epochs):
    """
    Of any two batches that lie within an epoch, one has the longer examples, up to a tenth: wherever the epoch begins. What
    counts is the longer of source and target.
    """
    data = first_of(unequal / task, n, size)
    length = lambda e: max(len(e['ids']), len(e.get('decoder_ids', [])))
    lengths = [length(e) for e in data.examples_of(range(epochs * n))]
    for epoch in range(epochs):
        first = -(-epoch * n // size) * size                                           # the first batch that begins in it
        whole = [lengths[i:i + size] for i in range(first, (epoch + 1) * n - size + 1, size)]
        for i, a in enumerate(whole):
            for b in whole[:i]:
                assert max(a) <= 1.1 * min(b) or max(b) <= 1.1 * min(a), f'{a} and {b}, batches of epoch {epoch}'
        if len(whole) > 9:
            means = [np.mean(batch) for batch in whole]
            assert means not in (sorted(means), sorted(means)[::-1]), 'from short to long, or back: they come in any order'


@pytest.mark.parametrize('task, key, limits', [
    ('classify', 'ids', {5: 0.07, 16: 0.12, 25: 0.22, 500: 0.5}), ('seq2seq', 'ids', {5: 0.15, 16: 0.2, 25: 0.28, 500: 0.5}),
    ('seq2seq', 'decoder_ids', {5: 0.2, 16: 0.25, 25: 0.35, 500: 0.6})])
def test_little_of_a_batch_is_padding(unequal, task, key, limits):
    """In a random order it would be 40 to 55 %; also where batches cross from an epoch to the next; batches differ, too."""
    for size, limit in limits.items():
        data = first_of(unequal / task, 192, size)
        pad, epochs = data.tokenizer._special_tokens['[PAD]'], []
        batches = [train.get_batch(data, 'supervised', 320, i, size, pad)[key] for i in range(0, max(3 * 192, size), size)]
        padding = sum((ids == pad).sum().item() for ids in batches) / sum(ids.numel() for ids in batches)
        assert padding < limit, f'{padding:.0%} of the {key} in batches of {size} are padding'
        if size == 16:
            there = [tuple(sorted((ids != pad).sum(dim=1).tolist())) for ids in batches]
            epochs = [{*there[i:i + 12]} for i in (0, 12, 24)]
            assert len(epochs[0] & epochs[1]) < 6 > len(epochs[1] & epochs[2]), 'the same batches again'


def test_training_reads_both_splits_in_batches_of_its_size(unequal, tmp_path, monkeypatch):
    """From the first step on, also with micro-batches: what the model is shown has little padding."""
    shown, collate = [], sample.collate
    monkeypatch.setattr(sample, 'collate', lambda *args: shown.append(collate(*args)) or shown[-1])
    model, s, tokenizer, data, val, _, _ = train.start({
        **TINY, 'dataset': str(unequal / 'classify'), 'block_size': 320, 'batch_size': 12, 'max_iters': 8,
        'gradient_accumulation_steps': 2, 'out_dir': str(tmp_path / 'out'), 'eval_iters': 1})
    train.train(model, data, val, s, tokenizer)
    assert data.batch_size == val.batch_size == 12
    real = [batch['keep'].float().mean().item() for batch in shown if 'keep' in batch and len(batch['ids']) == 12]
    assert len(real) >= 16 and np.mean(real) > 0.88, f'{1 - np.mean(real):.0%} of {len(real)} batches is padding'


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('pattern, instead, named', [
    ('.{9}$', '', 'line 2: '), ('.*', '[]', 'line 2: '), ('.*', '', ''), ('"ids"', '"id"', 'line 2: '),
    ('.*', None, '23 examples, not the 24'),
    ('"targets": .', '"targets": 2', 'line 2: '), ('"targets": .', '"targets": -7', 'line 2: '),  # labels are 0 and 1
    (r'"ids": \[', '"ids": [4096, ', ''), (r'"ids": \[', '"ids": [-1, ', '')])
def test_a_damaged_line_of_examples_is_named(tmp_path, split, pattern, instead, named):
    """File and line, and what to do, before anything is trained: never an index error in the middle."""
    # b6
    folder = labelled(tmp_path / 'd', 'classify')
    path = Path(folder) / f'{split}.jsonl'
    first, line, *rest = path.read_text(encoding='utf-8').splitlines()
    damaged = [] if instead is None else [re.sub(pattern, instead, line, count=1)]
    path.write_text('\n'.join([first, *damaged, *rest]), encoding='utf-8')
    with pytest.raises(ValueError, match=f'(?s){re.escape(folder)}.*{named}') as e:
        fit(folder, tmp_path / 'out', **WIDE, max_iters=1)
    assert split in str(e.value) and 'prepare the data again' in str(e.value), e.value


@pytest.mark.parametrize('split', ['train', 'val'])
def test_an_example_longer_than_block_size_is_refused(folders, split):
    """Both numbers and the remedies, before training; as long as block_size is not too long."""
    longest = train.Examples(str(folders / 'tag'), split).lengths.max()
    train.start({**TINY, 'dataset': str(folders / 'tag'), 'block_size': int(longest)})
    with pytest.raises(ValueError, match=rf'\.jsonl has an example of {longest} tokens, more than block_size={longest - 1}'):
        train.Examples(str(folders / 'tag'), split).check_length(longest - 1)
    with pytest.raises(ValueError, match=f'more than block_size={longest - 1}: .*--block_size'):
        train.start({**TINY, 'dataset': str(folders / 'tag'), 'block_size': int(longest) - 1})

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


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_the_optimizers_are_those_of_torch(name):
    """Twenty steps of several shapes, a weight without gradient among them, give the weights of torch.optim."""
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (3, 4)] + ([(7,)] if name == 'adamw' else [])
    s = train.Settings(optimizer=name, weight_decay=0.3, learning_rate=0.02, muon_learning_rate=0.05, beta1=0.8, beta2=0.9)
    ours, theirs = Weights([torch.randn(shape) for shape in shapes]), Weights([torch.randn(shape) for shape in shapes])
    theirs.load_state_dict(ours.state_dict())
    optimizer, = train.make_optimizers(ours, s, torch.bfloat16)
    groups = [{'params': [p for p in theirs.parameters() if p.dim() > 1], 'weight_decay': 0.3},
              {'params': [p for p in theirs.parameters() if p.dim() < 2], 'weight_decay': 0.0}]
    gradients = []
    for shape in shapes:  # all directions far from 0: what is nearly 0 is what rounding makes of it
        u, _, v = torch.linalg.svd(torch.randn(*shape, *[1] * (2 - len(shape))), full_matrices=False)
        gradients.append((u @ torch.diag(torch.linspace(0.3, 1, min(u.shape))) @ v).view(shape))
    other = torch.optim.Muon(groups[:1], lr=0.05)
    if name == 'adamw':
        other = torch.optim.AdamW([dict(group, lr=0.02, betas=(0.8, 0.9)) for group in groups])
    for i in range(20):
        for p, q, g in zip(ours.all, theirs.all, gradients):
            p.grad = g * (1 + i % 3)
            q.grad = p.grad.clone()
        ours.all[4].grad = theirs.all[4].grad = None
        optimizer.step()
        other.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in ours.parameters())
    for p, q in zip(ours.all, theirs.all):
        assert torch.allclose(p, q, atol=5e-4 if name == 'adamw' else 0.02), (p.shape, (p - q).abs().max())


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_matrices_and_embeddings_decay_and_vectors_do_not(data, optimizer):
    """With a zero gradient a step leaves w (1 - lr * weight_decay), which is what decoupled means; a bias stays."""
    # b5, [1]
    model, s, *_ = train.start({**TINY, 'dataset': data, 'optimizer': optimizer, 'weight_decay': 0.5, 'beta2': 0.9,
                                'learning_rate': 0.1, 'muon_learning_rate': 0.2})
    optimizers = train.make_optimizers(model, s, 'cpu')
    owners = collections.Counter(p for o in optimizers for group in o.param_groups for p in group['params'])
    assert owners == collections.Counter(model.parameters()), 'each weight in one group of one optimizer'
    assert sum(isinstance(o, train.AdamW) for o in optimizers) == 1
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
    model, s, _, _, val, _, machine = train.start({**TINY, 'dataset': data, 'preset': preset, 'dropout': 0.5, 'n_layer': 2})
    model.train(training)
    val.tokens = val.tokens[:n]
    scores, nats = train.evaluate(model, val, s, machine), slow_nats(model, val.tokens, 8)
    assert len(nats) == n - 1 and scores['loss'] == pytest.approx(np.mean(nats), rel=1e-4)
    assert scores['perplexity'] == pytest.approx(math.exp(np.mean(nats)), rel=1e-3)
    assert all(m.training == training for m in model.modules()), 'the mode was not restored'
    assert train.evaluate(model, val, s, machine) == scores, 'twice is not the same'


@pytest.mark.parametrize('tokenizer', ['char', 'byte'])
def test_bits_per_byte_count_the_bytes_of_the_text(tmp_path, tokenizer):
    """A character of Chinese has three bytes and an emoji four, whatever a token is; <|endoftext|> has none."""
    text = '静夜思 李白\n床前明月光，疑是地上霜。e\u0301🌙\n' * 3
    folder = prepared(tmp_path / 'd', text=text * 3, val=text, tokenizer=tokenizer)
    model, s, _, _, val, _, machine = train.start({**TINY, 'dataset': folder})
    nats = slow_nats(model, val.tokens, 8)
    assert len(nats) == (len(text) if tokenizer == 'char' else len(text.encode()))     # n - 1, with <|endoftext|>
    expected = sum(nats) / math.log(2) / len(text.encode())
    assert train.evaluate(model, val, s, machine)['bits_per_byte'] == pytest.approx(expected, rel=1e-4)


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
    for e in train.OBJECTIVES[objective](text, range(iters * n), 8):
        with torch.no_grad():
            logp = plain(torch.tensor(e['ids'])[None])[0][0].double().log_softmax(dim=-1)
        for t, target in enumerate(e['targets']):
            if target != models.IGNORE:
                nats, asked = nats - logp[t, target].item(), asked + 1
    found = train.estimate(model, model, text, s, machine, 0)
    assert set(found) == {'loss'} and found['loss'] == pytest.approx(nats / max(1, asked), rel=1e-4)
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
    monkeypatch.setattr(train, 'estimate', lambda *args: {'loss': next(losses)})
    fit(data, tmp_path, eval_interval=2, stop_at=5)
    assert (read(tmp_path / 'best.pt')['step'], read(tmp_path / 'best.pt')['best']) == (2, 2.0)
    fit(data, tmp_path, init_from='resume', max_iters=6)
    assert (read(tmp_path / 'best.pt')['step'], read(tmp_path / 'ckpt.pt')['step']) == (2, 6)
    fit(data, tmp_path, init_from='resume', max_iters=8)
    assert (read(tmp_path / 'best.pt')['step'], read(tmp_path / 'best.pt')['best']) == (8, 1.5)


@pytest.mark.parametrize('dataset', ['text', 'd', 'classify'])
def test_masked_scores_are_worked_out_row_by_row(folders, dataset):
    """Means over all hidden tokens and all pairs, without dropout, of the same rows every time; the mode is restored."""
    # b1, b2
    flags = {**TINY, **WIDE, 'dataset': str(folders / dataset), 'preset': 'bert', 'dropout': 0.5, 'objective': 'masked_lm',
             'eval_iters': 3}
    model, s, _, text, val, _, machine = train.start(flags)
    torch.nn.init.normal_(model.tokens.weight, std=0.5)
    calm = copy.deepcopy(model).eval()
    for n, found in ((12, train.estimate(model, model, text, s, machine, 0)),
                     (7, train.masked_scores(model, text, 7, s, machine))):
        nats, right, hidden, next_nats, next_right = [], [], [], [], []
        for e in train.masked_lm(text, range(n), 32):
            batch = sample.collate([{key: e[key] for key in ('ids', 'segments')}], 0)
            with torch.no_grad():
                x = calm.hidden(**batch)
                logp, follows = calm.fill(x)[0].double().log_softmax(dim=-1), calm.follows(x)[0].double().log_softmax(dim=-1)
            for t in np.flatnonzero(e['targets'] != models.IGNORE):
                target = int(e['targets'][t])
                nats.append(-logp[t, target].item())
                right.append(logp[t].argmax().item() == target)
                hidden.append(target)
            if 'next_targets' in e:
                next_nats.append(-follows[e['next_targets']].item())
                next_right.append(follows.argmax().item() == e['next_targets'])
        is_text = [i for i in text.tokens.tolist() if i not in text.tokenizer._special_tokens.values()]
        common = max(sorted(set(is_text)), key=collections.Counter(is_text).get)
        expected = {'loss': np.mean(nats), 'masked_accuracy': np.mean(right),
                    'commonest_token': hidden.count(common) / len(hidden)}
        if dataset == 'text':
            expected |= {'loss': np.mean(nats) + np.mean(next_nats), 'next_sentence_accuracy': np.mean(next_right)}
        assert found == pytest.approx(expected, rel=1e-4), n
    assert all(m.training for m in model.modules()), 'the mode was not restored'
    assert train.evaluate(model, val, s, machine) == train.evaluate(model, val, s, machine), 'twice is not the same'


@pytest.mark.parametrize('task', models.TASKS)
def test_a_task_is_scored_on_all_of_its_validation_data(folders, task):
    """An estimate of val is the whole split, whatever eval_iters says; the loss is a mean over its targets."""
    model, s, _, _, val, _, machine = train.start({**TINY, **WIDE, 'dataset': str(folders / task), 'preset': 'bert',
                                                   'eval_iters': 1, 'batch_size': 1, 'dropout': 0.5})
    found = train.estimate(model, model, val, s, machine, 0)
    calm, nats, asked = copy.deepcopy(model).eval(), 0.0, 0
    for e in val:
        with torch.no_grad():
            nats += calm(**sample.collate([e], 0), counts={'targets': 1})[1].item()
        asked += int((np.array(e['targets']) != models.IGNORE).sum())
    assert found['loss'] == pytest.approx(nats / asked, rel=1e-4) and train.METRICS[task] in found
    assert found == train.evaluate(model, val, s, machine) and all(m.training for m in model.modules())


@pytest.mark.parametrize('task, metric', [('classify', 'accuracy'), ('tag', 'f1'), ('qa', 'f1')])
def test_best_pt_of_a_task_has_its_best_metric_and_not_its_lowest_loss(folders, tmp_path, monkeypatch, task, metric):
    """The lowest loss comes later; what counts is best at step 2, and a number as good with a higher loss is not better."""
    scores = iter({'loss': loss, metric: np.float64(score)} for loss, score in
                  [(9, 0.9), (5, 0.2), (9, 0.9), (3, 0.7), (9, 0.9), (4, 0.7), (9, 0.9), (2, 0.6), (9, 0.9), (1, 0.8)])
    monkeypatch.setattr(train, 'estimate', lambda *args: next(scores))  # train, val of steps 0, 2, 4, 6; then 8
    fit(str(folders / task), tmp_path, eval_interval=2, max_iters=6, lr_decay_iters=8, **WIDE)
    best = read(tmp_path / 'best.pt')  # weights_only: a number of numpy would not load
    assert (best['step'], best['best'], type(best['best'])) == (2, 0.7, float)
    assert read(tmp_path / 'ckpt.pt')['waited'] == 2
    fit(str(folders / task), tmp_path, init_from='resume', max_iters=8)
    assert (read(tmp_path / 'best.pt')['step'], read(tmp_path / 'ckpt.pt')['best']) == (8, 0.8)


@pytest.mark.parametrize('resumed', [False, True])
def test_patience_ends_a_run_that_no_longer_gets_better(data, tmp_path, monkeypatch, capsys, resumed):
    """Three evaluations in a row without a better one; a better one begins the count again; a resumed run counts on."""
    losses = iter([9, 5, 9, 6, 9, 6, 9, 4, 9, 4, 9, 5, 9, 7, 9, 1])  # train, val; the third after the 4 ends it: step 6
    monkeypatch.setattr(train, 'estimate', lambda *args: {'loss': next(losses)})
    flags = dict(eval_interval=1, max_iters=20, patience=3)
    if resumed:
        assert fit(data, tmp_path, stop_at=4, **flags)[1]['waited'] == 0  # step 4 is evaluated when it goes on
        flags = dict(init_from='resume')
    _, state = fit(data, tmp_path, **flags)
    assert (state['step'], state['best'], state['waited']) == (6, 4, 3), state
    assert 'stopped at step 6: none of the last 3 evaluations was better' in capsys.readouterr().out
    assert read(tmp_path / 'best.pt')['step'] == 3 and read(tmp_path / 'ckpt.pt')['step'] == 6


@pytest.mark.parametrize('dataset, preset, line', [
    ('text', 'bert', r'val loss \S+, masked accuracy \S+, commonest token \S+, next sentence accuracy \S+'),
    ('classify', 'bert', r'val loss \S+, accuracy \S+, macro f1 \S+'),
    ('tag', 'gpt2', r'val loss \S+, precision \S+, recall \S+, f1 \S+'),
    ('qa', 'bert', r'val loss \S+, exact match \S+, f1 \S+')])
def test_eval_only_prints_the_scores_of_any_model_and_writes_nothing(folders, tmp_path, capsys, dataset, preset, line):
    """One line, from best.pt, over the whole validation split."""
    fit(str(folders / dataset), tmp_path / 'out', preset=preset, max_iters=1, **WIDE)
    state = lambda: {p: p.stat().st_mtime_ns for folder in (tmp_path, folders) for p in sorted(folder.rglob('*'))}
    before, _ = state(), capsys.readouterr()
    train.main([f'--out_dir={tmp_path}/out', '--eval_only'])
    out, err = capsys.readouterr()
    assert re.fullmatch(line + '\n', out) and (err, state()) == ('', before), out
    model, s, _, _, val, _, machine = train.start({'out_dir': f'{tmp_path}/out', 'eval_only': True})
    assert out == f'val {sample.format_scores(train.evaluate(model, val, s, machine))}\n'


def test_target_loss_ends_the_run_with_that_state_as_the_best(tmp_path, capsys):
    """It stops at the first evaluation that reaches it, and best.pt scores it on the whole split."""
    folder = prepared(tmp_path / 'd', text='春夏秋冬' * 120)
    model, state = fit(folder, tmp_path / 'out', max_iters=500, learning_rate=0.02, eval_interval=10, target_loss=0.5)
    assert state['step'] < 500 and state['step'] % 10 == 0, state
    best, checkpoint = models.load(str(tmp_path / 'out' / 'best.pt'))
    assert different(best, model) == [] and checkpoint['step'] == state['step']
    nats = slow_nats(best, train.Text(folder, 'val').tokens, 8)
    assert np.mean(nats) <= 0.5 and checkpoint['best'] == pytest.approx(np.mean(nats), rel=1e-4)
    assert 'target loss 0.5 reached after' in capsys.readouterr().out


def test_target_loss_is_confirmed_on_the_whole_split(data, tmp_path, monkeypatch, capsys):
    """A lucky estimate ends nothing: the whole split says no, the run goes on, and says at the end what was missed."""
    monkeypatch.setattr(train, 'estimate', lambda *args: {'loss': 0.01})
    _, state = fit(data, tmp_path, eval_interval=4, target_loss=0.02)
    assert state['step'] == 8 and state['best'] > 1, state
    assert 'target loss 0.02 not reached' in capsys.readouterr().out


def test_eval_only_prints_one_line_and_writes_nothing(data, tmp_path, monkeypatch, capsys):
    """`val loss 1.8980, perplexity 6.67, bits per byte 2.738`: of best.pt, over the whole split."""
    monkeypatch.chdir(tmp_path)
    fit(data, tmp_path / 'out', eval_interval=4)
    s = train.Settings(device='cpu', dtype='float32', objective='causal_lm')
    scores = train.evaluate(models.load(str(tmp_path / 'out' / 'best.pt'))[0], train.Text(data, 'val'), s, train.Machine(s))
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


def test_every_recipe_is_good_settings():
    """Of what is trained, and of the preset: names and values are those of the flags."""
    assert train.recipe('lm', 'nano')['optimizer'] == 'muon'
    assert set(train.RECIPES) == {'pretrain', 'more text', *prepare_data.TASKS}
    assert set().union(*train.RECIPES.values()) <= {'', *models.PRESETS}
    for task, goes_on in [('lm', True), *((task, False) for task in ('lm', *prepare_data.TASKS))]:
        for name in models.PRESETS:
            values = train.recipe(task, name, goes_on)
            own = {key: values[key] for key in values if hasattr(models.Config, key)}
            assert train.Settings(**{key: values[key] for key in values if key not in own}), (task, name)
            assert dataclasses.replace(models.PRESETS[name], **own), (task, name)
    assert train.recipe('lm', 'gpt2-124m', goes_on=True)['max_iters'] < 1000 < train.recipe('lm', 'gpt2-124m')['max_iters']


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
    ('--preset gpt5', '--preset gpt5: choose one of transformer, bert, gpt2, t5, palm'),
    ('--compile maybe', '--compile: maybe is neither True nor False'),
    ('--device cuda', '--device cuda: '),
    ('--init_from elsewhere/ckpt.pt', 'there is no checkpoint elsewhere/ckpt.pt'),
    ('--init_from resume', 'there is no checkpoint out/ckpt.pt'),
    ('--eval_only', 'there is no checkpoint out'),
    ('--patience -1', '--patience -1: must be at least 0'),
    ('--adversarial -1', '--adversarial -1.0: must be at least 0'),
    ('--freeze all', '--freeze all: choose none, embeddings, trunk, or a number'),
    ('--freeze 1 --adversarial 0.1', '--freeze 1'),
    ('--freeze trunk', '--freeze trunk: nothing is left to train'),
    ('--freeze 5', '--freeze 5: the model has 4 blocks'),
    ('--freeze 1 --preset lstm', '--freeze 1: the model has no blocks'),
    ('--objective skipgram', '--objective skipgram: choose one of causal_lm, masked_lm, span_corruption, supervised, '
        'completion'),
    ('--objective masked_lm', '--objective masked_lm is not for a gpt, which sees only the past'),
    ('--objective masked_lm --preset lstm', '--objective masked_lm is not for a lstm, which sees only the past'),
    ('--objective causal_lm --preset bert', '--objective causal_lm is not for a bert, which would see the answer'),
    ('--objective supervised', '--objective supervised: '),
    ('--preset bert --block_size 2', 'block_size'),  # [CLS] and [SEP], and no room for text
    ('--task classify', '--task classify: '),
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
    ('--init_from resume --freeze embeddings', '--freeze embeddings'),  # which its optimizer moves
    ('--init_from resume --objective masked_lm', '--objective masked_lm'), ('--init_from . --preset bert', '--preset bert'),
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
        train.Text(str(folder), 'train')


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
    monkeypatch.setitem(prepare_data.DATASETS, 'pydoc', ('lm', lambda mirror: TEXT))
    machine = train.Machine(train.Settings(device='cpu'))
    folder = train.find_dataset('pydoc', machine)
    assert len(train.Text(folder, 'train').tokens) > 100 and train.find_dataset('pydoc', machine) == folder
    assert capsys.readouterr().out.count('preparing') == 1


FLAGS = {
    'train.py': """
        dataset preset init_from out_dir config eval_only dry_run device_memory device_speed objective best_by batch_size
        gradient_accumulation_steps max_iters
        eval_interval eval_iters log_interval sample_tokens patience target_loss optimizer learning_rate muon_learning_rate
        min_lr
        warmup_iters lr_decay_iters lr_schedule weight_decay beta1 beta2 grad_clip freeze adversarial seed device dtype
        compile backend
        arch task n_labels vocab_size block_size n_layer n_head n_kv_head n_embd head_dim mlp_dim norm norm_eps norm_weight
        norm_first qk_norm parallel activation scale_attention bias segments embedding_norm positions rope_theta rope_scaling
        window buckets max_distance scale_embedding scale_output tied logit_cap init dropout label_smoothing""",
    'sample.py': """
        start out_dir init_from num_samples max_new_tokens temperature num_beams length_penalty top_k top_p stop seed stream
        score json export attention device dtype""",
    'prepare_data.py': 'dataset input val task tokenizer vocab_size val_fraction block_size out_dir show mirror',
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
    assert checkpoint.keys() == {'config', 'model', 'tokenizer', 'task', 'labels', 'step', 'best', 'best_loss', 'waited',
                                 'seconds', 'settings', 'optimizer', 'scaler', 'evaluated', 'data'}
    for name in ('config', 'tokenizer', 'settings'):
        assert json.loads(json.dumps(checkpoint[name])) == checkpoint[name], name
    assert checkpoint['settings']['batch_size'] == 4 and checkpoint['step'] == 2

# -----------------------------------------------------------------------------
# Fine-tuning: from one task to the next


@pytest.fixture(scope='module')
def trained(folders):
    """Folders with a model each, hardly trained: bert and gpt2 on text, and each of them on a task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Log, 'plot', lambda log: None)
        for preset, task in (('bert', 'classify'), ('gpt2', 'tag')):
            flags = dict(WIDE, preset=preset, max_iters=2)
            fit(str(folders / 'text'), folders / f'out-{preset}', **flags)
            fit(str(folders / task), folders / f'out-{task}', **flags)
    return folders


@pytest.mark.parametrize('task', models.TASKS)
@pytest.mark.parametrize('preset', ['bert', 'gpt2'])
def test_fine_tuning_begins_with_the_trunk_as_it_was_and_a_new_head(trained, tmp_path, capsys, preset, task):
    """All weights of the checkpoint, bit for bit; a head that knows nothing, with the labels; and it is said."""
    model, s, _, data, *_, checkpoint, _ = train.start({'dataset': f'{trained}/{task}', 'out_dir': str(tmp_path / 'out'),
                                                        'init_from': f'{trained}/out-{preset}', 'dropout': 0.25})
    out, before = capsys.readouterr().out, read(trained / f'out-{preset}' / 'best.pt')
    assert different(model.trunk, before['model']) == [] and checkpoint is None
    assert {name for name in model.state_dict() if not name.startswith('trunk.')} == {'head.weight', 'head.bias'}
    assert (model.head.bias == 0).all() and 0 < model.head.weight.std() < 0.05
    assert dataclasses.asdict(model.config) == {**before['config'], 'task': task, 'n_labels': len(data.labels),
                                                'dropout': 0.25}
    assert 'trunk loaded' in out and f'head for {task}' in out and all(label in out for label in data.labels), out
    steps = train.recipe(task, preset)['max_iters']
    assert (s.objective, s.preset, s.max_iters) == ('supervised', preset, steps), 'not the recipe of the task'
    assert not (tmp_path / 'out').exists()


def test_labels_travel_in_the_checkpoint(trained):
    """In the order of the head's rows; a model of text has none."""
    for name, task in (('out-classify', 'classify'), ('out-tag', 'tag'), ('out-bert', '')):
        for file in ('ckpt.pt', 'best.pt'):
            saved = read(trained / name / file)
            labels = prepare_data.read_json(f'{trained}/{task}/meta.json')['labels'] if task else []
            assert (saved['task'], saved['labels'], saved['config']['n_labels']) == (task, labels, len(labels))
            assert saved['settings']['objective'] == ('supervised' if task else 'masked_lm')
    assert read(trained / 'out-classify' / 'best.pt')['labels'] == ['bad', '好']


def test_the_head_of_another_task_is_replaced_and_that_of_the_same_is_kept(trained, tmp_path, capsys):
    """Other labels are another task; --objective masked_lm takes the trunk alone. Each is said, but for what stays."""
    origin = f'{trained}/out-classify/ckpt.pt'
    weights = read(origin)['model']
    same = train.start({'init_from': origin})[0]  # keeps the data set, too
    assert different(same, weights) == [] and capsys.readouterr().out == ''
    trunk = {name.removeprefix('trunk.'): p for name, p in weights.items() if name.startswith('trunk.')}
    tagger = train.start({'init_from': origin, 'dataset': f'{trained}/tag'})[0]
    assert different(tagger.trunk, trunk) == [] and tagger.head.out_features == 3
    assert tagger.config.dropout == train.recipe('tag', 'bert').get('dropout', 0.0), 'not the dropout of the recipe'
    assert 'head for tag with the labels O, B-name, I-name' in capsys.readouterr().out
    for labels, kept in ((['好', 'bad'], True), (['good', 'bad'], False)):  # sorted, the first are those of before
        (tmp_path / 'rows').write_text(''.join(f'{label}\tfilm\n' for label in labels) * 5, encoding='utf-8')
        prepare_data.prepare(prepare_data.Settings(task='classify', input=[f'{tmp_path}/rows'], tokenizer='byte',
                                                   out_dir=f'{tmp_path}/other'))
        capsys.readouterr()
        other = train.start({'init_from': origin, 'dataset': f'{tmp_path}/other'})[0]
        assert different(other.trunk, trunk) == []
        assert set(different(other, weights)) == (set() if kept else {'head.weight', 'head.bias'}), labels
        assert ('labels bad, good' in capsys.readouterr().out) != kept, labels
    for flags in ({'dataset': f'{trained}/text'}, {'objective': 'masked_lm'}):
        model, s, *_ = train.start({'init_from': origin, **flags})
        assert different(model, trunk) == [] and s.objective == 'masked_lm'
        assert 'the trunk alone, without its head for classify' in capsys.readouterr().out


@pytest.mark.parametrize('flags, named', [
    ('--init_from out-bert --dataset other', 'other was encoded with another tokenizer than out-bert'),
    ('--init_from out-classify --dataset other', 'other was encoded with another tokenizer than out-classify'),
    ('--init_from resume --out_dir out-classify --dataset tag', 'was trained for classify with the labels'),
    ('--init_from resume --out_dir out-classify --dataset text', 'was trained for classify'),
    ('--init_from resume --out_dir out-bert --dataset classify --objective supervised', 'was trained for pre-training'),
    ('--eval_only --out_dir out-classify --dataset tag', 'was trained for classify with the labels'),
    ('--init_from out-bert --dataset tag --objective causal_lm',
     '--objective causal_lm is not for a bert, which would see the answer'),
    ('--init_from out-gpt2 --dataset text --objective masked_lm',
     '--objective masked_lm is not for a gpt, which sees only the past'),
    ('--init_from out-gpt2 --dataset text --objective supervised', '--objective supervised: text has no labels'),
    ('--init_from out-bert --dataset tag --n_labels 9', '--n_labels 9'),
    ('--init_from out-bert --dataset tag --preset gpt2', '--preset gpt2'),
    ('--init_from out-bert --dataset tag --block_size 9', 'more than block_size=9'),
    ('--init_from out-bert --dataset tag --freeze 3', '--freeze 3: the model has 1 blocks'),
    ('--init_from out-bert --dataset nowhere', '--dataset nowhere: there is no data folder')])
def test_what_does_not_fit_together_is_refused_in_one_line(trained, tmp_path, capsys, monkeypatch, flags, named):
    """Exit status 2, and no file has changed."""
    # b6
    monkeypatch.chdir(trained)
    if not (trained / 'other').exists():
        prepare_data.prepare(prepare_data.Settings(task='classify', input=['classify.rows'], tokenizer='char',
                                                   out_dir='other'))
    state = lambda: {p: p.stat().st_mtime_ns for folder in (trained, tmp_path) for p in sorted(folder.rglob('*'))}
    before, words = state(), flags.split()
    capsys.readouterr()
    err = refused(words if '--out_dir' in words else [*words, f'--out_dir={tmp_path}/out'], capsys, monkeypatch)
    assert named in err, f'{err!r} does not say {named!r}'
    assert state() == before, set(state()) ^ set(before)


@pytest.mark.parametrize('task', models.TASKS)
@pytest.mark.parametrize('preset', ['bert', 'gpt2'])
def test_every_task_is_learned_from_the_command_line(folders, tmp_path, capsys, preset, task):
    """24 rows by heart, on an encoder and on a decoder: the log shows it, best.pt scores it, --eval_only repeats it."""
    # b3: a head that reads padding, or targets that have moved, would not get there
    flags = {**TINY, **WIDE, 'n_embd': 32, 'mlp_dim': 64, 'batch_size': 12, 'max_iters': 150, 'eval_interval': 50,
             'learning_rate': 0.01, 'dropout': 0.0, 'preset': preset, 'dataset': f'{folders}/{task}', 'out_dir': tmp_path}
    train.main([f'--{key}={value}' for key, value in flags.items()])
    out = capsys.readouterr().out
    metric = train.METRICS[task]
    best = float(re.search(rf'best validation {metric} (\S+)\. ', out)[1])
    assert best > 0.95 and '24 examples' in out, out
    losses = [float(row[2]) for row in log_rows(tmp_path)[1:]]
    assert len(losses) == 4 and losses[-1] < losses[0] / 3, losses
    train.main([f'--out_dir={tmp_path}', '--eval_only'])
    assert f'{metric} {best:.4f}' in capsys.readouterr().out.replace('macro f1', '')


def test_from_text_to_answers_in_four_commands(tmp_path):
    """Prepare, pre-train, prepare with the same tokenizer, fine-tune: as a user types them."""
    (tmp_path / 'books.txt').write_text(pages(*BOOKS), encoding='utf-8')
    (tmp_path / 'reviews.tsv').write_text('good\tfine 犬\nbad\tpoor 犬\tnot good\n' * 10, encoding='utf-8')
    run = lambda *words: command(*words, cwd=tmp_path, env=ONE_THREAD).stdout
    tiny = ['--n_layer=1', '--n_embd=16', '--n_head=2', '--batch_size=4', '--device=cpu']
    run('prepare_data.py', '--input', 'books.txt', '--tokenizer', 'byte', '--val_fraction', '0.5')
    run('train.py', '--dataset', 'books', '--preset', 'bert', '--max_iters', '3', '--out_dir', 'out-bert', *tiny)
    run('prepare_data.py', '--task', 'classify', '--input', 'reviews.tsv', '--tokenizer', 'books')
    said = run('train.py', '--init_from', 'out-bert', '--dataset', 'reviews', '--max_iters', '3', '--freeze', 'embeddings',
               '--batch_size=4')
    assert 'trunk loaded' in said and 'new: a head for classify with the labels bad, good' in said, said
    before, after = (read(tmp_path / name / 'ckpt.pt') for name in ('out-bert', 'out'))
    assert after['labels'] == ['bad', 'good']
    assert torch.equal(before['model']['tokens.weight'], after['model']['trunk.tokens.weight'])

# -----------------------------------------------------------------------------
# Text to text


NUMERALS = 'one two three four five six seven eight nine ten eleven twelve'.split()


@pytest.fixture(scope='module')
def pairs(folders):
    """A folder with twelve number words and their digits, in the bytes of `text`; the same to train and to validate."""
    rows = ''.join(f'{word}\t{n}\n' for n, word in enumerate(NUMERALS, 1))
    (folders / 'pairs.tsv').write_text(rows, encoding='utf-8')
    prepare_data.prepare(prepare_data.Settings(task='seq2seq', input=[f'{folders}/pairs.tsv'], val=[f'{folders}/pairs.tsv'],
                                               tokenizer='byte', block_size=16, out_dir=f'{folders}/pairs'))
    return str(folders / 'pairs')


SHORT = dict(block_size=16)


@given(first=st.integers(0, 50), n=st.integers(1, 9))
def test_completion_asks_for_the_target_alone_and_for_its_end(pairs, first, n):
    """source [SEP] target; asked are the tokens of the target and <|endoftext|>, each where the one before it stands."""
    # b4, b14
    data, rows = train.open_data(pairs, 'train'), range(first, first + n)
    special = data.tokenizer._special_tokens
    end_id, sep, pad_id = (special[name] for name in ('<|endoftext|>', '[SEP]', '[PAD]'))
    assert len({end_id, sep, pad_id}) == 3
    for made, row in zip(train.completion(data, rows, 16), train.supervised(data, rows, 16), strict=True):
        source, target = [*row['about']['source'].encode()], [*row['about']['target'].encode()]
        assert made['ids'] == [*source, sep, *target], made
        assert made['targets'] == [models.IGNORE] * len(source) + [*target, end_id], made
    batch = train.get_batch(data, 'completion', 16, first, n, pad_id)
    assert (batch['targets'] == end_id).sum() == n, 'every row is to end'
    if 'keep' in batch:
        assert (batch['targets'][~batch['keep']] == models.IGNORE).all(), 'padding is asked for'
        assert (batch['ids'][~batch['keep']] == pad_id).all()


def restored(example, special):
    """Source and target of span_corruption put together again: (the text, which of it was hidden)."""
    sentinels = [special[f'<extra_{i}>'] for i in range(100)]
    runs, now = {}, None
    for t in example['targets'][:-1]:
        if t in sentinels:
            now = runs.setdefault(t, [])
        else:
            now.append(t)
    text, hidden = [], []
    for t in example['ids'][:-1]:
        text += runs.get(t, [t])
        hidden += [t in runs] * len(runs.get(t, [t]))
    return text, hidden, list(runs)


@given(T=st.integers(8, 90), first=st.integers(0, 300), n=st.integers(1, 6), seed=st.integers(0, 3))
@example(T=8, first=0, n=2, seed=0)
@example(T=9, first=0, n=2, seed=0)
def test_hiding_runs_loses_no_token_and_keeps_their_order(folders, T, first, n, seed):
    """Source and target together are the window; sentinels in order; nothing is longer than the model."""
    data = train.open_data(f'{folders}/d', 'train', seed)
    special, starts = data.tokenizer._special_tokens, data.window_starts(range(first, first + n), T)
    for made, at in zip(train.span_corruption(data, range(first, first + n), T), starts, strict=True):
        end_id, (text, hidden, sentinels) = special['<|endoftext|>'], restored(made, special)
        assert text == data.tokens[at:at + T].tolist(), f'{text} was not there'
        assert sentinels == [special[f'<extra_{i}>'] for i in range(len(sentinels))] and sentinels
        assert [t for t in made['ids'] if t in sentinels] == sentinels, 'a sentinel comes twice, or too late'
        assert made['ids'][-1] == made['targets'][-1] == made['decoder_ids'][0] == end_id
        assert made['decoder_ids'][1:] == made['targets'][:-1], 'the decoder is not to be shown what it is asked'
        assert sum(hidden) == max(2, round(0.15 * T)), f'{sum(hidden)} of {T}'
        assert not hidden[0], 'a run must follow some text'
        assert len(made['ids']) <= T and len(made['targets']) <= T, \
            f'{len(made["ids"])} and {len(made["targets"])} tokens, block_size {T}'


def test_15_percent_are_hidden_in_runs_of_three_that_lie_anywhere(folders):
    """In windows of 100: 15 tokens in 5 runs of every length from 1 to 11, in every place but the first, drawn anew."""
    data, lengths, places = train.open_data(f'{folders}/d', 'train'), collections.Counter(), np.zeros(100)
    special = data.tokenizer._special_tokens
    made = train.span_corruption(data, range(2000), 100)
    for e in made:
        _, hidden, sentinels = restored(e, special)
        assert (sum(hidden), len(sentinels)) == (15, 5), e
        runs = [len(list(run)) for key, run in itertools.groupby(hidden) if key]
        assert len(runs) == 5, 'runs touch each other'
        lengths.update(runs)
        places += hidden
    assert min(lengths) == 1 and max(lengths) >= 9 and sum(n * k for n, k in lengths.items()) / lengths.total() == 3, lengths
    # 15 cut into 5: the first run has length 1 in C(13, 3) / C(14, 4) = 286 of 1001 ways
    assert sigmas(lengths[1], lengths.total(), 286 / 1001) < 4.5, lengths
    assert places[0] == 0 and (places[1:] > 0).all(), places
    assert sigmas(places[:50].sum(), 2000 * 50, places.sum() / 2000 / 100) < 30, 'one half is hidden more often'


@given(first=st.integers(0, 500), n=st.integers(2, 9), cut=st.integers(1, 8), dataset=st.sampled_from(['d', 'classify']))
def test_hidden_runs_are_the_same_however_rows_are_shared(folders, first, n, cut, dataset):
    """Eight rows are two times four, and eight times one, whatever was read before."""
    cut, fresh = min(cut, n - 1), lambda seed=3: train.open_data(f'{folders}/{dataset}', 'train', seed)
    whole, used = plain(train.span_corruption(fresh(), range(first, first + n), 32)), fresh()
    later = plain(train.span_corruption(used, range(first + cut, first + n), 32))
    assert plain(train.span_corruption(used, range(first, first + cut), 32)) + later == whole
    assert [plain(train.span_corruption(used, range(row, row + 1), 32))[0] for row in range(first, first + n)] == whole
    assert plain(train.span_corruption(fresh(4), range(first, first + n), 32)) != whole, 'another seed, the same rows'


@pytest.mark.parametrize('arch, task, expected', [
    ('gpt', '', 'causal_lm'), ('lstm', '', 'causal_lm'), ('bert', '', 'masked_lm'), ('encdec', '', 'span_corruption'),
    ('gpt', 'seq2seq', 'completion'), ('lstm', 'seq2seq', 'completion'), ('encdec', 'seq2seq', 'supervised'),
    ('gpt', 'tag', 'supervised'), ('bert', 'classify', 'supervised')])
def test_a_model_has_a_usual_objective(arch, task, expected):
    """What the data asks, and how this model can answer; it passes its own check."""
    config = models.Config(arch=arch, task='' if task == 'seq2seq' else task, n_labels=2)
    assert train.usual_objective(config, task) == expected
    train.check_objective(train.Settings(objective=expected), config, task, 'folder')


@pytest.mark.parametrize('flags, named', [
    ('--dataset pairs --preset bert', 'asks for texts, and a bert cannot write'),
    ('--dataset pairs --preset gpt2 --objective supervised', '--objective supervised: does not fit'),
    ('--dataset pairs --preset transformer --objective completion', '--objective completion: does not fit'),
    ('--dataset text --preset gpt2 --objective completion', '--objective completion: text has no labels'),
    ('--dataset text --preset gpt2 --objective span_corruption', '--objective span_corruption is not for a gpt'),
    ('--dataset text --preset bert --objective span_corruption', '--objective span_corruption is not for a bert'),
    ('--dataset text --preset t5 --objective causal_lm', '--objective causal_lm is not for a encdec: use span_corruption'),
    ('--dataset text --preset t5 --objective masked_lm', '--objective masked_lm is not for a encdec: use span_corruption'),
    ('--dataset classify --preset transformer', 'an encoder-decoder answers with text'),
    ('--dataset text --preset t5 --block_size 3', 'span_corruption needs at least 8'),
    ('--dataset pairs --preset transformer --block_size 6', 'has an example of 7 tokens, more than block_size=6'),
    ('--dataset pairs --preset gpt2 --block_size 7', 'more than block_size=7'),
    ('--dataset pairs --preset transformer --best_by accuracy', '--best_by accuracy: choose one of loss, bleu, rouge1'),
    ('--dataset text --preset gpt2 --best_by bleu', '--best_by bleu'),
    ('--dataset classify --preset bert --best_by bleu', '--best_by bleu')])
def test_text_to_text_that_does_not_fit_is_one_line(pairs, folders, tmp_path, capsys, monkeypatch, flags, named):
    """Exit status 2, and nothing is written."""
    monkeypatch.chdir(folders)
    tiny = [f'--{key}={value}' for key, value in {**TINY, **WIDE}.items() if f'--{key}' not in flags]
    capsys.readouterr()
    err = refused([*tiny, f'--out_dir={tmp_path}/out', *flags.split()], capsys, monkeypatch)
    assert named in err, f'{err!r} does not say {named!r}'
    assert not (tmp_path / 'out').exists()


def test_source_and_target_together_must_fit_into_a_decoder(pairs):
    """An encoder-decoder needs room for each of them, a decoder for both."""
    data = train.open_data(pairs, 'train')
    assert data.lengths.shape == (12, 2) and data.lengths[10].tolist() == [len('eleven') + 1, len('11') + 1]
    data.check_length(7)
    data.check_length(10, whole=True)
    for n, whole in ((6, False), (8, True)):
        with pytest.raises(ValueError, match=f'more than block_size={n}'):
            data.check_length(n, whole=whole)


@pytest.mark.parametrize('preset', ['transformer', 'gpt2'])
def test_mean_loss_and_evaluation_are_those_of_every_row_alone(pairs, preset):
    """The mean over all asked tokens, not over batches, without dropout or smoothing; scores of greedy texts; mode kept."""
    # b1, b2
    model, s, _, _, val, _, machine = train.start({**TINY, **SHORT, 'dataset': pairs, 'preset': preset, 'dropout': 0.5,
                                                   'label_smoothing': 0.3, 'batch_size': 5, 'best_by': 'bleu'})
    calm, nats, asked = copy.deepcopy(model).eval(), 0.0, 0
    for i in range(len(val)):
        [e] = train.OBJECTIVES[s.objective](val, range(i, i + 1), 16)
        with torch.no_grad():
            logits = calm(**{key: torch.tensor([e[key]]) for key in ('ids', 'decoder_ids') if key in e})[0][0]
        targets = torch.tensor(e['targets'])
        nats += F.cross_entropy(logits, targets, ignore_index=models.IGNORE, reduction='sum').item()
        asked += int((targets != models.IGNORE).sum())
    found = train.evaluate(model, val, s, machine)
    assert asked == sum(len(str(n)) + 1 for n in range(1, 13)), asked
    assert found['loss'] == pytest.approx(nats / asked, rel=1e-4), f'{found}, {nats} / {asked}'
    assert list(found) == ['loss', 'bleu', 'rouge1', 'rouge2', 'rougeL', 'exact_match']
    assert all(m.training for m in model.modules()), 'the mode was not restored'
    assert train.mean_loss(model, model, val, dataclasses.replace(s, batch_size=12), machine, 0, 12) == pytest.approx(
        nats / asked, rel=1e-4)
    estimated = train.estimate(model, model, val, s, machine, 0)
    assert estimated['bleu'] == found['bleu']
    assert list(train.estimate(model, model, val, dataclasses.replace(s, best_by=''), machine, 0)) == ['loss']


@pytest.mark.parametrize('best_by, step, best', [('', 4, 1.0), ('loss', 4, 1.0), ('bleu', 4, 30.0), ('rouge1', 2, 0.5),
                                                 ('exact_match', 6, 0.9)])
def test_best_by_says_what_makes_a_checkpoint_the_best(pairs, tmp_path, monkeypatch, best_by, step, best):
    """The lowest loss, or the highest score, of equal ones that of the lower loss; a resumed run remembers."""
    rows = [(9.0, 0.0, 0.4, 0.0), (2.0, 30.0, 0.5, 0.1), (1.0, 30.0, 0.0, 0.2), (3.0, 10.0, 0.5, 0.9)]  # steps 0, 2, 4, 6
    scores = iter(dict(zip(('loss', 'bleu', 'rouge1', 'exact_match'), map(np.float64, numbers)))
                  for row in rows for numbers in [(0.5, 99.0, 1.0, 1.0), row])  # those of train do not count
    monkeypatch.setattr(train, 'estimate', lambda *args: next(scores))
    flags = {'best_by': best_by} if best_by else {}
    fit(pairs, tmp_path, preset='transformer', eval_interval=2, max_iters=6, stop_at=3, **SHORT, **flags)
    fit(pairs, tmp_path, init_from='resume')
    found = read(tmp_path / 'best.pt')
    assert (found['step'], found['best'], type(found['best'])) == (step, best, float), found['best']


@pytest.mark.parametrize('preset', ['transformer', 'gpt2', 'lstm'])
def test_number_words_are_learned_from_the_command_line(pairs, tmp_path, capsys, preset):
    """Twelve pairs by heart: the score of the best checkpoint is that of --eval_only, and of sample.py."""
    # b3, b14: an end that is never asked for, or a target that sees itself, would not get there
    flags = {**TINY, **SHORT, 'n_embd': 32, 'mlp_dim': 64, 'batch_size': 12, 'max_iters': 200, 'eval_interval': 100,
             'learning_rate': 0.01, 'lr_schedule': 'linear', 'preset': preset, 'dataset': pairs, 'out_dir': tmp_path,
             'best_by': 'exact_match', 'label_smoothing': 0.0}
    train.main([f'--{key}={value}' for key, value in flags.items()])
    out = capsys.readouterr().out
    best = float(re.search(r'best validation exact_match (\S+)\. ', out)[1])
    assert best > 0.9 and 'exact match' in out, out
    train.main([f'--out_dir={tmp_path}', '--eval_only'])
    assert f'exact match {best:.4f}' in capsys.readouterr().out
    saved = read(tmp_path / 'best.pt')
    assert (saved['task'], saved['labels']) == ('seq2seq', [])
    sample.main([f'--out_dir={tmp_path}', '--device=cpu', f'--score={pairs}.tsv', '--json'])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ['bleu', 'rouge1', 'rouge2', 'rougeL', 'exact_match']
    assert found['exact_match'] == pytest.approx(best, abs=1e-4), found


def test_a_t5_learns_from_text_and_is_then_tuned(pairs, folders, tmp_path, capsys):
    """span_corruption on plain text lowers the loss; from there seq2seq begins with all weights as they were."""
    flags = dict(SHORT, preset='t5', max_iters=40, eval_interval=20, learning_rate=0.01)
    fit(f'{folders}/text', tmp_path / 't5', **flags)
    losses = [float(row[1]) for row in log_rows(tmp_path / 't5')[1:]]
    assert losses[-1] < losses[0] - 0.3, losses
    saved = read(tmp_path / 't5/ckpt.pt')
    assert saved['task'] == '' and saved['settings']['objective'] == 'span_corruption'
    tuned, s, *_, checkpoint, _ = train.start({**TINY, 'dataset': pairs, 'init_from': f'{tmp_path}/t5/ckpt.pt'})
    assert different(tuned, saved['model']) == [] and s.objective == 'supervised' and checkpoint is None
    fit(pairs, tmp_path / 'tuned', init_from=f'{tmp_path}/t5/ckpt.pt', block_size=16, max_iters=3)
    assert read(tmp_path / 'tuned/ckpt.pt')['task'] == 'seq2seq'
    train.main([f'--out_dir={tmp_path}/t5', '--eval_only'])
    assert re.fullmatch(r'val loss \d+\.\d{4}\n', capsys.readouterr().out.splitlines(True)[-1])


@pytest.mark.parametrize('preset', ['transformer', 'gpt2', 't5'])
def test_a_resumed_run_of_text_to_text_is_the_unbroken_one(pairs, tmp_path, preset):
    """Bit for bit, across an epoch."""
    # b1, b12
    flags = dict(SHORT, preset=preset, dropout=0.2, max_iters=6)
    whole, _ = fit(pairs, tmp_path / 'a', **flags)
    fit(pairs, tmp_path / 'b', stop_at=3, **flags)
    resumed, _ = fit(pairs, tmp_path / 'b', init_from='resume')
    assert different(whole, resumed) == []


@pytest.mark.parametrize('preset', ['transformer', 'gpt2'])
def test_from_pairs_to_answers_on_the_command_line(tmp_path, preset):
    """Prepare, train, ask by a pipe, score: as a user types them."""
    (tmp_path / 'numbers.tsv').write_text(''.join(f'{word} 二\t{n}\n' for n, word in enumerate(NUMERALS)), encoding='utf-8')
    run = lambda *words, **more: command(*words, cwd=tmp_path, env=ONE_THREAD, **more).stdout
    run('prepare_data.py', '--task', 'seq2seq', '--input', 'numbers.tsv', '--tokenizer', 'char', '--val_fraction', '0.2',
        '--block_size', '24')
    said = run('train.py', '--dataset', 'numbers', '--preset', preset, '--max_iters', '3', '--n_layer=1', '--n_embd=16',
               '--n_head=2', '--batch_size=4', '--device=cpu', '--block_size=24', '--best_by=bleu')
    assert 'best validation bleu' in said, said
    assert len(run('sample.py', '--start', '-', '--device=cpu', input='one 二\n\ntwo\n').split('\n')) == 4
    scores = json.loads(run('sample.py', '--score', 'numbers.tsv', '--json', '--num_beams=2', '--device=cpu'))
    assert list(scores) == ['bleu', 'rouge1', 'rouge2', 'rougeL', 'exact_match'], scores

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


def test_a_full_disk_is_one_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    """torch hides what the system said behind a RuntimeError: the user gets the reason, the path, and the old checkpoint."""
    path = tmp_path / 'ckpt.pt'
    models.write_file(path, lambda f: f.write(b'old'))

    def write(f):
        try:
            raise OSError(errno.ENOSPC, 'No space left on device')
        finally:
            raise RuntimeError('unexpected pos 126272 vs 126224')

    with pytest.raises(OSError, match='No space left on device') as error:
        models.write_file(path, write)
    assert error.value.filename == path and path.read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1


def test_of_equal_scores_the_one_with_the_lower_loss_is_the_best(tmp_path, monkeypatch):
    """Where a score starts at 0 and stays there for a while, best.pt must not be the untrained model of step 0."""
    rows = '\n'.join(f'{"good" if i % 2 else "bad"}\t{"nice fine" if i % 2 else "poor sad"} {i}' for i in range(40))
    (tmp_path / 'rows.tsv').write_text(rows, encoding='utf-8')
    prepare_data.prepare(prepare_data.Settings(task='classify', input=[str(tmp_path / 'rows.tsv')], tokenizer='byte',
                                               out_dir=str(tmp_path / 'data')))
    losses = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(train, 'evaluate', lambda *args: {'loss': next(losses), 'accuracy': 0.5, 'macro_f1': 0.5})
    out = tmp_path / 'out'
    train.main(['--dataset', str(tmp_path / 'data'), '--preset', 'bert', '--n_layer', '1', '--n_embd', '16', '--max_iters',
                '2', '--eval_interval', '1', '--eval_iters', '1', '--batch_size', '4', '--device', 'cpu', '--out_dir',
                str(out)])
    best, latest = (torch.load(out / name, weights_only=True) for name in ('best.pt', 'ckpt.pt'))
    assert best['step'] == 1 and best['best_loss'] == 2.0, f"best.pt is that of step {best['step']}"
    assert latest['step'] == 2 and latest['waited'] == 1 and latest['best_loss'] == 2.0


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGTERM that a process could catch')
def test_a_preparation_that_is_told_to_end_leaves_nothing(tmp_path):
    """SIGTERM is how machines say stop: the half-written folder goes."""
    (tmp_path / 'big.txt').write_text('One two three. ' * 2_000_000, encoding='utf-8')
    process = subprocess.Popen([sys.executable, str(ROOT / 'prepare_data.py'), '--input', 'big.txt'], cwd=tmp_path)
    while process.poll() is None and not list(tmp_path.glob('data/*.tmp')):
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not os.path.exists(tmp_path / 'data') or not os.listdir(tmp_path / 'data'), os.listdir(tmp_path / 'data')


# -----------------------------------------------------------------------------
# Before it spends, and again: --dry_run, --config


@pytest.mark.parametrize('preset, dataset', [('gpt2', 'text'), ('bert', 'text'), ('nano', 'd'), ('llama', 'tag'),
                                             ('t5', 'd'), ('lstm', 'classify')])
def test_a_rehearsal_counts_what_a_real_step_holds(folders, preset, dataset):
    """Tensors without memory add up to those of the same step with memory: weights, gradients, optimizer, and the peak."""
    given = {'dataset': str(folders / dataset), 'preset': preset, 'batch_size': 4, 'dtype': 'float32', 'n_layer': 2, **WIDE}
    model, s, _, data, _, _, machine = train.start(given)
    batch = train.get_batch(data, s.objective, model.config.block_size, 0, 4, data.tokenizer._special_tokens['[PAD]'])
    weights, gradients, state, activations, flops = train.rehearse(model.config, s, [batch], machine)
    n = sum(p.numel() for p in model.parameters())
    optimizers = train.make_optimizers(model, s, torch.float32)
    model.train()
    if preset == 'lstm':
        batch.pop('keep', None)
    with train.Live(list(model.parameters())) as live:
        model(**batch, counts={'targets': 1})[1].backward()
        peak = live.peak
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    real = sum(t.numel() * t.element_size() for o in optimizers for tensors in o.state.values() for t in tensors)
    assert weights == 4 * n
    assert real == pytest.approx(state, rel=0.05), f'{preset}: the optimizer holds {real}, and {state} were foretold'
    assert weights + gradients + activations == pytest.approx(peak, rel=0.15), f'{preset}: {peak} at the peak'
    assert flops > 0 and gradients >= 0.5 * weights


def test_the_products_of_a_gpt_are_six_for_each_parameter_and_token(data, tmp_path):
    """Two for the way forward and four for the way back; attention adds its share, and embeddings cost none."""
    given = {'dataset': data, 'n_layer': 3, 'n_head': 1, 'n_embd': 64, 'block_size': 8, 'batch_size': 4, 'dtype': 'float32'}
    model, s, _, text, _, _, machine = train.start(given)
    batch = train.get_batch(text, s.objective, 8, 0, 4)
    products = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and 'positions' not in name)
    flops = train.rehearse(model.config, s, [batch], machine)[-1]
    attention = 3 * 12 * 64 * 8 * 32                   # layers, 2 products forward and 4 back of 2 C T FLOPs a token
    assert flops == pytest.approx(6 * products * 32 + attention, rel=0.06), f'{flops} FLOPs, {products} weights'


@pytest.mark.parametrize('flags, said', [
    ('', 'is enough'), ('--device_memory 0.2', 'one of 0.2 GB is too small'),
    ('--preset palm-8b --device_memory 80', 'would need'),
    ('--preset bert', 'MFLOPs a token'), ('--device_speed 100 --max_iters 7', 'at 100,000 GFLOP/s')])
def test_a_dry_run_says_what_it_costs_and_writes_nothing(folders, tmp_path, monkeypatch, capsys, flags, said):
    """Six lines, in a second, even of a model that no machine here could hold."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['train.py', '--dataset', str(folders / 'text'), '--batch_size', '2', '--dry_run',
                                      '--block_size', '16', *flags.split()])
    prepare_data.run(train.main)
    out = capsys.readouterr().out
    assert said in out, out
    assert [line.split()[0] for line in out.splitlines()] == ['parameters', 'tokens', 'compute', 'memory', 'time', 'devices']
    assert not list(tmp_path.iterdir()), 'something was written'


@pytest.mark.parametrize('preset', ['gpt2', 'llama', 'nano', 'bert', 't5'])
def test_the_config_of_a_run_repeats_it_bit_for_bit(folders, tmp_path, monkeypatch, preset):
    """out/config.toml holds every choice; with it alone, and another out_dir, the same weights come about."""
    monkeypatch.chdir(tmp_path)
    run = lambda *flags: (monkeypatch.setattr(sys, 'argv', ['train.py', *flags]), prepare_data.run(train.main))
    run('--dataset', str(folders / 'text'), '--preset', preset, '--out_dir', 'a', *'--max_iters 3 --eval_iters 1 '
        '--n_layer 1 --block_size 16 --batch_size 2 --seed 7 --dropout 0.2 --sample_tokens 0'.split())
    run('--config', 'a/config.toml', '--out_dir', 'b')
    assert not different(read('a/ckpt.pt')['model'], read('b/ckpt.pt')['model'])
    text = (tmp_path / 'b' / 'config.toml').read_text()
    assert text.replace('"b"', '"a"') == (tmp_path / 'a' / 'config.toml').read_text()


def test_a_flag_counts_more_than_the_config_and_that_more_than_a_recipe(folders, tmp_path, monkeypatch):
    """default < recipe and preset < --config < flag."""
    seen, text = [], '# 真\nlearning_rate = 1\nbatch_size = 3\nbias = false\ndataset = "真"\nmin_lr = 1e-3\n'
    (tmp_path / 'c.toml').write_text(text, encoding='utf-8')
    _, s, *_ = train.start({'dataset': str(folders / 'd'), 'preset': 'nano', 'learning_rate': 0.5, **WIDE})
    assert (s.learning_rate, s.optimizer) == (0.5, 'muon')
    monkeypatch.setattr(train, 'start', lambda given: seen.append(given) or sys.exit(0))
    monkeypatch.setattr(sys, 'argv', ['train.py', '--batch_size', '5', '--config', str(tmp_path / 'c.toml')])
    with pytest.raises(SystemExit):
        prepare_data.run(train.main)
    del seen[0]['config']
    assert seen[0] == {'learning_rate': 1.0, 'batch_size': 5, 'bias': False, 'dataset': '真', 'min_lr': 1e-3}


@pytest.mark.parametrize('text, said', [
    ('max_iter = 3', 'did you mean max_iters'), ('max_iters = "many"', 'max_iters = many is not a whole number'),
    ('max_iters = 2.5', 'such as 2'), ('max_iters =', 'is not TOML'), ('compile = "perhaps"', 'neither True nor False'),
    ('config = "b.toml"', 'unknown flag config'), ('seed = -1', '--seed -1'), ('\udcff', 'is not TOML'),
    ('preset = ["gpt2"]', '--preset'), ('dropout = true', 'dropout = True is not a number')])
def test_a_config_that_is_wrong_is_refused_in_one_line(data, tmp_path, monkeypatch, capsys, text, said):
    """It names the file and the flag."""
    (tmp_path / 'c.toml').write_bytes(text.encode('utf-8', 'surrogateescape'))
    assert said in refused(['--dataset', data, '--config', str(tmp_path / 'c.toml'), '--out_dir', f'{tmp_path}/out'], capsys,
                           monkeypatch)


def test_the_end_of_a_document_is_a_target_like_any_other(data):
    """Or the model would never learn to stop. b14"""
    text = train.Text(data, 'train')
    end_id = text.tokenizer._special_tokens['<|endoftext|>']
    text.tokens = np.full(18, end_id, np.uint16)
    batch = train.get_batch(text, 'causal_lm', 8, 0, 2)
    assert (batch['targets'] == end_id).all(), batch['targets']


def test_memory_is_pinned_for_cuda_alone(data):
    """MPS has no pinned memory; neither has a device without data, which stands in for it here."""
    batch = train.get_batch(text_data(data, 18), 'causal_lm', 8, 0, 2, device='meta')
    assert {t.device.type for t in batch.values()} == {'meta'}


def test_a_step_in_which_nothing_is_asked_is_no_nan(data, tmp_path, monkeypatch):
    """Labelled data whose answers were all cut off: the loss is 0 and the gradient too, not 0 / 0."""
    plain = train.OBJECTIVES['causal_lm']
    monkeypatch.setitem(train.OBJECTIVES, 'causal_lm', lambda *args: [
        {**e, 'targets': np.full_like(e['targets'], models.IGNORE)} for e in plain(*args)])
    model, state = fit(data, tmp_path, max_iters=2)
    assert state['step'] == 2 and state['best'] == 0 and all(p.isfinite().all() for p in model.parameters())


def test_which_texts_are_shown_and_what_of_them_is_hidden_are_drawn_apart(folders, monkeypatch):
    """The last three numbers of a row choose its two texts, and none of them hides a token."""
    text, shown = train.Text(str(folders / 'text'), 'train'), []
    for seed in (0, 1):
        u = np.random.default_rng(seed).random((8, 2 * 32 + 3))
        u[:, -3:] = np.random.default_rng(2).random((8, 3))
        monkeypatch.setattr(text, 'uniforms', lambda rows, n: u)
        rows = train.masked_lm(text, range(8), 32)
        shown.append([(np.where(e['targets'] == models.IGNORE, e['ids'], e['targets']).tolist(), e['next_targets'])
                      for e in rows])
    assert shown[0] == shown[1]
