"""
What train.py promises, each promise once: what an objective shows and hides, that every example
comes once an epoch, what a step, an optimizer and an evaluation compute, which flags count, and
which files a run leaves. Under torchrun this file is itself one of two processes: see RUNS.

The ids b1 to b17 stand for bugs that really happened in code of this kind.
"""

import inspect
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import types
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (ALL, DOCUMENTS, ROWS, SMALL_PRESETS, WIDE, close, different, fit, gradients,
                      log_of, main, prepared, read, same_run)
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as models
import prepare_data
import train
from model import IGNORE_INDEX, PRESETS, Config, build, optimizer_groups
from train import OBJECTIVES, Data, Runtime, Settings, get_batch

only = lambda cls, values: prepare_data.pick(values, *cls.__dataclass_fields__)

def parts_of(folder, split='train', **flags):
    """(model with random weights, data, settings, runtime), of the size of WIDE."""
    values = {**WIDE, **flags}
    data = Data(str(folder), split, values['seed'], values['batch_size'])
    objective = values.get('objective') or next(name for name, o in OBJECTIVES.items()
        if PRESETS[values['preset']].arch in o.archs and data.task in o.tasks)
    s = Settings(**{**only(Settings, values), 'objective': objective})
    head = {}
    if objective == 'supervised':
        head = dict(task=data.task, n_labels=len(data.labels))
    model = build(replace(PRESETS[s.preset], **only(Config, values), **head,
                          vocab_size=data.vocab_size))
    with torch.no_grad():
        for p in model.parameters():  # zeros of a new model would hide most gradients
            p.normal_(0, 0.2)
    return model, data, s, Runtime(s)

def by_hand(model, data, s, indices):
    """Nats, right guesses and targets of each kind, summed over examples taken one at a time."""
    nats, right, counts = Counter(), Counter(), Counter()
    for i in indices:
        batch = get_batch(data, s.objective, model.config.block_size, i, 1)
        for kind in [key for key in batch if key.endswith('targets')]:
            one = {key: t for key, t in batch.items() if key == kind or 'targets' not in key}
            logits, loss = model(**one, **{f'num_{kind}': 1})
            targets, logits = batch[kind].flatten(), logits.flatten(0, -2)
            if len(logits) < len(targets):
                targets = targets[targets != IGNORE_INDEX]
            nats[kind] += loss
            right[kind] += int((logits.argmax(dim=1) == targets).sum())
            counts[kind] += int((targets != IGNORE_INDEX).sum())
    return nats, right, counts

def within(count, n, p):
    """Whether a count is within 5 standard deviations of a binomial distribution."""
    assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p)), f'{count} of {n}, expected {p}'

def test_a_row_added_to_a_table_is_a_choice(monkeypatch):
    """Of your own objective, from Python, too."""
    monkeypatch.setitem(OBJECTIVES, 'mine', OBJECTIVES['causal_lm'])
    assert Settings(objective='mine').objective == 'mine' and Settings().objective == ''
    with pytest.raises(ValueError, match=r'causal_lm, masked_lm.* mine'):
        Settings(objective='yours')

# -----------------------------------------------------------------------------
# Windows

def numbered(folder, n, split='train', seed=0):
    """Data whose token at position i is i."""
    data = Data(folder, split, seed)
    data.tokens = np.arange(n)
    return data

@given(n=st.integers(10, 200), T=st.integers(1, 9), index=st.integers(0, 500))
@example(n=9, T=8, index=0)
def test_causal_lm_predicts_the_next_token_of_every_window_once_an_epoch(d, n, T, index):
    """Targets are the ids one later (b4), and an epoch takes windows that do not overlap, once."""
    data = numbered(d, n, seed=index)
    windows = data.windows(T)
    epoch = index // windows * windows
    starts = []
    for i in range(epoch, epoch + windows):
        e = OBJECTIVES['causal_lm'].example(data, i, T)
        assert len(e['ids']) == T and (e['targets'] == e['ids'] + 1).all()
        starts.append(int(e['ids'][0]))
    starts.sort()
    assert set(np.diff(starts)) <= {T} and starts[0] >= 0 and starts[-1] + T < n
    assert n - 1 - windows * T < 2 * T or windows == 1

def test_other_epochs_have_other_offsets_and_orders_and_every_token_is_seen(d):
    """Any token can be the first of a window, and the order depends on seed and epoch."""
    data, T = numbered(d, 50), 8
    windows = data.windows(T)
    firsts = [int(data.window(i, T)[0]) for i in range(80 * windows)]
    assert {first % T for first in firsts} == set(range(T))
    assert {0, 50 - T - 1} <= set(firsts)
    epochs = {tuple(firsts[i:i + windows]) for i in range(0, len(firsts), windows)}
    assert len(epochs) > 70
    assert firsts[:9] != [int(numbered(d, 50, seed=1).window(i, T)[0]) for i in range(9)]

@given(n=st.integers(2, 100), T=st.integers(1, 9))
def test_validation_predicts_every_token_but_the_first_exactly_once(d, n, T):
    """In the order of the text; the last window may be shorter."""
    T = min(T, n - 1)
    data = numbered(d, n, 'val')
    examples = [OBJECTIVES['causal_lm'].example(data, i, T) for i in range(data.windows(T))]
    assert np.concatenate([e['targets'] for e in examples]).tolist() == list(range(1, n))

@pytest.mark.parametrize('split', ['train', 'val'])
def test_block_size_and_one_more_token_are_enough_and_one_less_is_not(d, split):
    """b4: a bound that is off by one; the error names both numbers."""
    assert numbered(d, 9, split).window(0, 8).tolist() == list(range(9))
    with pytest.raises(ValueError, match=r'8 tokens in .*block_size \+ 1 = 9'):
        numbered(d, 8, split).window(0, 8)

# -----------------------------------------------------------------------------
# Objectives

def unmasked(e):
    """The ids of a masked example before anything was hidden."""
    return np.where(np.array(e['targets']) == IGNORE_INDEX, e['ids'], e['targets'])

@pytest.mark.parametrize('dataset', ['text', 'd', 'classify'])
def test_masked_lm_hides_15_percent_and_of_those_80_10_10(folders, dataset):
    """Never a special token, at least one; a random token is text; the data stays as it is (b7)."""
    data = Data(str(folders / dataset), 'train')
    special, mask = {*data.tokenizer.special.values()}, data.tokenizer.id('[MASK]')
    before = [list(row['ids']) for row in data.rows] or data.tokens.tolist()
    chosen, shown = [], Counter()
    for i in range(400):
        e = OBJECTIVES['masked_lm'].example(data, i, 40)
        ids, original = np.array(e['ids']), unmasked(e)
        places = np.flatnonzero(np.array(e['targets']) != IGNORE_INDEX)
        n_text = sum(int(i) not in special for i in original)
        assert len(places) == max(1, round(0.15 * n_text)) and len(ids) == len(e['segments'])
        assert not special & {*original[places].tolist()}
        assert set(ids[places].tolist()) & special <= {mask}
        chosen += places.tolist()
        shown['mask'] += int((ids[places] == mask).sum())
        shown['same'] += int((ids[places] == original[places]).sum())
    within(shown['mask'], len(chosen), 0.8)
    within(shown['same'], len(chosen), 0.1)  # a random token is hardly ever the same one
    assert len(set(chosen)) > 20
    assert before == ([list(row['ids']) for row in data.rows] or data.tokens.tolist())

def texts_of_pair(data, e):
    """The texts A and B of a pair, whose frame is checked: [CLS] A [SEP] B [SEP]."""
    ids, token = unmasked(e).tolist(), data.tokenizer.id
    assert ids[0] == token('[CLS]') and ids[-1] == token('[SEP]')
    first = ids.index(token('[SEP]'))
    assert ids.count(token('[SEP]')) == 2
    assert list(e['segments']) == [0] * (first + 1) + [1] * (len(ids) - first - 1)
    return data.tokenizer.decode(ids[1:first]), data.tokenizer.decode(ids[first + 1:-1])

@pytest.mark.parametrize('T', [14, 40, 120])
def test_half_of_the_pairs_follow_and_the_others_are_of_two_documents(folders, T):
    """B is the next sentence of A, or of another document (b8); both still touch when cut."""
    data, follows = Data(str(folders / 'text'), 'train'), 0
    firsts, longest, most = Counter(), 0, 0
    for i in range(400):
        e = OBJECTIVES['masked_lm'].example(data, i, T)
        a, b = texts_of_pair(data, e)
        longest, most = max(longest, len(e['ids'])), max(most, len(a) / (T - 3))
        if e['next_targets']:
            assert any(a + b in text for text in DOCUMENTS)
        else:
            assert any(b in text for text in DOCUMENTS) and b[0] not in a
            firsts[b[:3]] += 1
        assert a.endswith('\n') and re.match('[A-H][0-9]', b)  # a sentence ends, another begins
        follows += e['next_targets']
    within(follows, 400, 0.5)
    assert longest == T and (T < 120 or 0.6 < most <= 0.75) and (T < 20 or len(firsts) > 50)

def sentences_of(folder, text, tokenizer):
    """The sentences that Data finds in a text, and the number of the document of each."""
    folder = prepared(folder, text, tokenizer=tokenizer, vocab_size=600)
    data = Data(folder, 'train')
    starts, document, _ = data.sentences
    return [data.tokenizer.decode(data.tokens[a:b].tolist()).replace('<|endoftext|>', '|')
            for a, b in zip(starts, starts[1:])], document.tolist()

def test_sentences_are_found_in_ids(tmp_path):
    """As in the drawing: behind . and ? before white space, at line ends and at document ends."""
    text = 'One. Two? No! 3.14\nFour\n<|endoftext|>\nFive\n'
    found, document = sentences_of(tmp_path / 'en', text * 9, 'bpe')
    assert [s.strip('|\n ') for s in found[:5]] == ['One.', 'Two?', 'No!', '3.14', 'Four']
    assert document[:7] == [0, 0, 0, 0, 0, 1, 1]
    for tokenizer in ('char', 'byte'):  # one token, or three, for a mark
        text = '狐狸。犬！“好？”\nक।چ؟چ\nա։ አ።\n'
        found, document = sentences_of(tmp_path / tokenizer, text, tokenizer)
        assert found == ['狐狸。', '犬！', '“好？”\n', 'क।', 'چ؟', 'چ\n', 'ա։ ', 'አ።\n|']
        assert set(document) == {0}

def test_text_without_two_documents_is_masked_in_plain_windows(d, tmp_path, capsys):
    """There is no next sentence prediction then, which the run says."""
    data = Data(d, 'train')
    e = OBJECTIVES['masked_lm'].example(data, 3, 20)
    assert 'next_targets' not in e and len(e['ids']) == 20 and set(e['segments']) == {0}
    assert unmasked(e)[1:-1].tolist() == data.window(3, 18)[:-1].tolist()
    fit(tmp_path, d, preset='bert', max_iters=0)
    assert capsys.readouterr().out.count('no next sentence prediction') == 2
    two = prepared(tmp_path / 'two', 'One. Two.\n<|endoftext|>\n' * 9, 'One. Two. ' * 9)
    fit(tmp_path, two, preset='bert', max_iters=0)
    assert 'no two documents in val' in capsys.readouterr().out  # whose loss would be less

@given(T=st.integers(2, 80), index=st.integers(0, 300))
@example(T=2, index=0)
@example(T=2200, index=0)
def test_span_corruption_loses_no_token_and_keeps_their_order(folders, T, index):
    """15 % are hidden, at least two; sentinel i stands for span i in the source and the target."""
    data = Data(str(folders / 'text'), 'train')
    data.tokens = np.tile(data.tokens, 3)
    tokenizer, window = data.tokenizer, data.window(index, T)[:-1].tolist()
    e = OBJECTIVES['span_corruption'].example(data, index, T)
    source, target = list(e['ids']), list(e['targets'])
    assert e['decoder_ids'] == [tokenizer.start_id, *target[:-1]]
    assert source.pop() == target.pop() == tokenizer.end_id
    sentinels = [tokenizer.id(f'<extra_{i}>') for i in range(100)]
    spans, used = {}, [i for i in target if i in sentinels]
    for token in target:
        if token in sentinels:
            spans[token] = []
        else:
            spans[used[len(spans) - 1]].append(token)
    assert used == sentinels[:len(used)] == [i for i in source if i in sentinels]
    assert all(spans.values())
    rebuilt = [token for i in source for token in spans.get(i, [i])]
    hidden = sum(map(len, spans.values()))
    assert rebuilt == window and hidden == max(1 + (T > 2), round(0.15 * T)) and len(source) <= T
    assert T < 40 or 2 <= hidden / len(spans) <= 4
    tokenizer.special['<|source|>'] = 7  # as CodeT5 has one
    assert OBJECTIVES['span_corruption'].example(data, index, T + 1)['ids'] == [7, *e['ids']]

def test_a_completion_is_a_prompt_of_which_only_the_target_is_predicted(folders):
    """source [SEP] target; each target stands where the token before it is."""
    data = Data(str(folders / 'seq2seq'), 'val')
    for i, row in enumerate(data.rows):
        e = OBJECTIVES['completion'].example(data, i, 40)
        p = len(row['ids']) - 1  # without the end of the source
        assert e['ids'] == row['ids'][:-1] + [data.tokenizer.id('[SEP]')] + row['targets'][:-1]
        assert e['targets'] == [IGNORE_INDEX] * p + row['targets']
        assert data.tokenizer.decode(row['targets'][:-1]) == row['meta']['target']

@given(batch_size=st.integers(1, 50), epochs=st.integers(1, 4))
@example(batch_size=16, epochs=4)
@example(batch_size=50, epochs=2)
@example(batch_size=5, epochs=4)
def test_an_epoch_takes_every_row_once_in_batches_of_about_one_length(folders, batch_size, epochs):
    """Also where batch_size does not divide the rows; each epoch has an order of its own (b17)."""
    data = Data(str(folders / 'classify'), 'train', 0, batch_size)
    n = len(data.rows)
    rows = [data.row(i) for i in range(epochs * n)]
    orders = [tuple(row['meta']['row'] for row in rows[i:i + n]) for i in range(0, len(rows), n)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len(set(orders)) == epochs
    lengths = [len(row['ids']) for row in rows[:n]]
    assert batch_size > 5 or np.corrcoef(range(n), lengths)[0, 1] < 0.9, 'short rows come first'
    spread, whole = [], 0
    for i in range(0, len(rows) - batch_size + 1, batch_size):
        if i // n == (i + batch_size - 1) // n:  # all of it in one epoch
            lengths = [len(row['ids']) for row in rows[i:i + batch_size]]
            spread.append(max(lengths) - min(lengths))
            whole += 1
    if whole and 4 * batch_size <= n:
        assert np.mean(spread) < 1 + 36 * batch_size / n, (spread, batch_size)

@pytest.mark.parametrize('dataset, objective', ALL)
def test_a_batch_is_the_same_however_its_examples_are_shared(folders, dataset, objective):
    """Example i is a function of (seed, split, i); the keys of a batch are arguments of forward."""
    data, same = (Data(str(folders / dataset), 'train', 3, 4) for _ in range(2))
    whole = get_batch(data, objective, 40, 37, 9)
    arch = 'task' if objective == 'supervised' else OBJECTIVES[objective].archs[0]
    cls = models.TaskModel if arch == 'task' else models.MODELS[arch]
    assert whole.keys() <= inspect.signature(cls.forward).parameters.keys()
    assert 'targets' in whole
    for i in (8, 0, 3):  # alone, and in another order
        one = get_batch(same, objective, 40, 37 + i, 1)
        real = whole['attention_mask'][i].sum() if 'attention_mask' in whole else None
        assert one['ids'].size(1) == (real or whole['ids'].size(1))
        for key, t in one.items():
            row = whole[key][i]
            width = t.size(1) if t.dim() == 2 else None
            assert torch.equal(row[:width] if row.dim() else row, t[0]), key
    other = get_batch(Data(str(folders / dataset), 'train', 4, 4), objective, 40, 37, 9)
    assert whole['ids'].shape != other['ids'].shape or not torch.equal(whole['ids'], other['ids'])

# -----------------------------------------------------------------------------
# Optimizers

@pytest.mark.parametrize('flags, points', [
    (dict(), {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.1, 35: 0.955018, 60: 0.605, 110: 0.11, 5000: 0.11}),
    (dict(lr_schedule='linear'), {0: 0.1, 10: 1.1, 35: 0.8525, 60: 0.605, 110: 0.11, 999: 0.11}),
    (dict(lr_schedule='constant'), {0: 0.1, 9: 1.0, 10: 1.1, 110: 1.1, 5000: 1.1}),
    (dict(lr_schedule='linear', min_lr=0.0), {60: 0.55, 110: 0.0}),
    (dict(lr_schedule='linear', lr_decay_iters=60, min_lr=0.1), {35: 0.6, 60: 0.1, 100: 0.1}),
    (dict(lr_schedule='linear', warmup_iters=0), {0: 1.1, 55: 0.605})])
def test_learning_rate_at_points_worked_by_hand(flags, points):
    """Ten steps up to 1.1, a hundred down to a tenth of it unless the flags say otherwise."""
    s = Settings(**{'learning_rate': 1.1, 'warmup_iters': 10, 'max_iters': 110, **flags})
    found = {step: train.learning_rate(step, s) for step in points}
    assert found == pytest.approx(points, rel=1e-5)

def test_adamw_is_that_of_torch():
    """Thirty steps with changing rates, two groups, and a weight that at times has no gradient."""
    ours = [torch.randn(shape, requires_grad=True) for shape in [(6, 4), (5,), (3, 3)]]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    groups = lambda ps: [{'name': 'a', 'params': ps[:1], 'weight_decay': 0.3},
                         {'name': 'b', 'params': ps[1:], 'weight_decay': 0.0}]
    a = train.AdamW(groups(ours), 0.4, (0.8, 0.9))
    b = torch.optim.AdamW(groups(theirs), betas=(0.8, 0.9), eps=1e-8)
    for i in range(30):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        if i % 3 == 0:
            ours[2].grad = theirs[2].grad = None
        for group in b.param_groups:
            group['lr'] = 0.4 * 0.05 / (1 + i)
        a.step(0.05 / (1 + i))
        b.step()
        a.zero_grad()
        assert all(p.grad is None for p in ours)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q)

@given(rows=st.integers(1, 24), columns=st.integers(1, 24), scale=st.floats(1e-3, 1e3))
def test_the_step_of_muon_is_nearly_orthogonal(rows, columns, scale):
    """All singular values are near 1, in the directions of the gradient, whatever its size."""
    u, _, v = torch.linalg.svd(torch.randn(3, rows, columns), full_matrices=False)
    x = u @ torch.diag(torch.linspace(0.2, 1, min(rows, columns))) @ v * scale
    found = train.orthogonal(x)
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() and values.max() < 1.3, values
    cosine = F.cosine_similarity(found.flatten(1), (u @ v).flatten(1))
    assert cosine.min() > 0.9, cosine

def slow_muon_step(p, g, m, lr, momentum, decay):
    """One matrix, as Jordan et al. 2024 write it down."""
    m.mul_(momentum).add_(g, alpha=1 - momentum)
    x = (1 - momentum) * g + momentum * m
    x = x.T if p.size(0) > p.size(1) else x
    x = x / x.norm()
    for _ in range(5):
        y = x @ x.T
        x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
    x = x.T if p.size(0) > p.size(1) else x
    p.mul_(1 - lr * decay).add_(x, alpha=-lr * max(1, p.size(0) / p.size(1)) ** 0.5)

def test_muon_is_the_same_matrix_by_matrix():
    """Matrices of one shape are taken together; one without gradient does not move."""
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (6, 4)]
    weights = [torch.randn(shape) for shape in shapes]
    slow, moments = [p.clone() for p in weights], [torch.zeros(shape) for shape in shapes]
    muon = train.Muon([{'params': weights, 'weight_decay': 0.3}], 0.05, 0.8, torch.float32)
    for i in range(6):
        for k, p in enumerate(weights):
            p.grad = None if (i + k) % 4 == 0 else torch.randn(p.shape)
            if p.grad is not None:
                slow_muon_step(slow[k], p.grad, moments[k], 0.05, 0.8, 0.3)
        muon.step()
    for p, q in zip(weights, slow):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('make', [lambda groups: train.AdamW(groups, 0.1, (0.9, 0.99)),
                                  lambda groups: train.Muon(groups, 0.1, 0.8, torch.float32)])
def test_a_bad_step_changes_neither_weights_nor_means(make):
    """As if it had not been: the next one is that of a run without it."""
    weights, steps = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)], torch.randn(2, 4, 3)
    optimizer = make([{'params': weights, 'weight_decay': 0.3}])
    for good, value in ((1.0, 0.0), (0.0, math.nan), (0.0, math.inf), (1.0, 0.0)):
        tensors = [*weights, *(t for p in weights for t in optimizer.state[p])]
        before = [t.clone() for t in tensors]
        for p, step in zip(weights, steps):
            p.grad = step + value
        optimizer.step(1.0, torch.tensor(good))
        assert all(torch.equal(a, b) != bool(good) for a, b in zip(tensors, before))

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('preset', ['gpt2', 't5'])
def test_matrices_and_embeddings_decay_and_vectors_do_not(folders, optimizer, preset):
    """Each weight has one optimizer; with zero gradients w becomes w (1 - lr * decay) (b5)."""
    model, _, s, runtime = parts_of(folders / 'text', preset=preset, optimizer=optimizer,
                                    weight_decay=0.5, learning_rate=0.1, muon_learning_rate=0.2,
                                    muon_momentum=0.7)
    optimizers = train.OPTIMIZERS[optimizer](optimizer_groups(model, 0.5), s, runtime.dtype)
    owners = Counter(p for o in optimizers for g in o.param_groups for p in g['params'])
    assert owners == Counter(model.parameters())
    assert optimizer == 'adamw' or optimizers[0].momentum == 0.7
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for o in optimizers:
        o.step()
    for name, p in model.named_parameters():
        in_blocks = optimizer == 'muon' and '.blocks.' in name
        left = 1.0 if p.dim() < 2 else 1 - 0.5 * (0.2 if in_blocks else 0.1)
        torch.testing.assert_close(p.data, before[name] * left)

def test_a_run_follows_the_schedule_and_muon_at_its_own_height(d, tmp_path):
    """With zero decay and one step at half of the peak, Muon's step is half of its peak rate."""
    flags = dict(optimizer='muon', muon_learning_rate=0.4, weight_decay=0.0, warmup_iters=1,
                 grad_clip=0.0)
    start, end = (fit(tmp_path / str(n), d, max_iters=n, **flags)['model'] for n in (0, 1))
    name = next(name for name in start if name.endswith('mlp.proj.weight'))
    rows, columns = start[name].shape
    scale = 0.4 / 2 * math.sqrt(max(1, rows / columns))
    values = torch.linalg.svdvals((start[name] - end[name]) / scale)
    assert 0.5 < values.max() < 1.3, values

# -----------------------------------------------------------------------------
# A step

@pytest.mark.parametrize('dataset, preset, objective', [
    ('d', 'gpt2', ''), ('text', 'bert', ''), ('text', 't5', ''), ('classify', 'gpt2', ''),
    ('tag', 'bert', ''), ('qa', 'lstm', ''), ('seq2seq', 'transformer', ''),
    ('seq2seq', 'llama', 'completion')])
def test_the_loss_of_a_step_is_the_mean_over_the_targets_of_all_its_micro_batches(
        folders, dataset, preset, objective):
    """3 x 2 examples, 1 x 6 and one at a time have one loss and gradient (b1), ragged or not."""
    found = []
    for k, n in ((3, 2), (1, 6)):
        torch.manual_seed(0)
        model, data, s, runtime = parts_of(folders / dataset, preset=preset, objective=objective,
                                           batch_size=n, gradient_accumulation_steps=k)
        data.batch_size = 2  # the order of labelled rows depends on it
        loss = train.backward(2, model, model, data, s, runtime)
        found.append((loss.item(), gradients(model)))
    model.zero_grad()
    nats, _, counts = by_hand(model, data, s, range(12, 18))
    assert ('next_targets' in counts) == (dataset == 'text' and preset == 'bert')
    expected = sum(nats[kind] / counts[kind] for kind in nats)
    expected.backward()
    for loss, grads in found:
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grads[name], grad, rtol=2e-3, atol=2e-5)

def test_two_micro_batches_of_labelled_rows_are_one_of_twice_their_size(folders, tmp_path):
    """A step takes the same rows, grouped by length, whatever its micro-batches are."""
    one, two = (fit(tmp_path / str(k), folders / 'classify', **WIDE | dict(preset='gpt2',
        batch_size=4 // k, gradient_accumulation_steps=k, max_iters=3)) for k in (1, 2))
    for name, p in one['model'].items():
        close(two['model'][name], p, 1e-4)

def test_a_step_without_any_target_is_no_nan(folders):
    model, data, s, runtime = parts_of(folders / 'tag', preset='bert')
    for row in data.rows:
        row['targets'] = [IGNORE_INDEX] * len(row['ids'])
    assert train.backward(0, model, model, data, s, runtime).item() == 0
    assert all((grad == 0).all() for grad in gradients(model).values())

def test_the_logits_are_freed_before_gradients_are_made(folders):
    """With a large vocabulary they are the largest tensor of all."""
    model, data, s, runtime = parts_of(folders / 'text')
    kept = []
    def forward(**batch):
        logits, loss = model(**batch)
        alive = weakref.ref(logits)
        loss.register_hook(lambda _: kept.append(alive()))
        return logits, loss
    train.backward(0, model, forward, data, s, runtime)
    assert kept == [None]

def trainer(folder, out, scale=None, **flags):
    """A Trainer with a tiny GPT; scale: scale losses as float16 does on a GPU, but in float32."""
    torch.manual_seed(0)
    model, data, s, runtime = parts_of(folder, out_dir=str(out), block_size=8, **flags)
    if scale:
        runtime.scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    out.mkdir(exist_ok=True)
    return train.Trainer(model, data, Data(str(folder), 'val'), s, runtime)

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_clipping_sees_the_gradient_and_not_its_scaled_copy(d, tmp_path, optimizer):
    """b9: with a scale of 65536 and a limit below the gradient the weights end the same."""
    ends = []
    for name, scale in (('plain', None), ('scaled', 65536.0)):
        t = trainer(d, tmp_path / name, scale, grad_clip=1e-3, beta2=0.5, optimizer=optimizer,
                    weight_decay=0.0, learning_rate=1e-2)
        t.run()
        ends.append(t.model.state_dict())
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[1][name], p, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('limit', [0.5, 0.0])
def test_a_long_gradient_is_cut_to_the_limit(d, tmp_path, limit):
    """AdamW's first mean is (1 - beta1) g, so a checkpoint shows the length of g; 0 is no limit."""
    t = trainer(d, tmp_path, grad_clip=limit, max_iters=1, eval_interval=1, beta1=0.8, beta2=0.5)
    train.backward(0, t.model, t.model, t.data, t.s, t.runtime)
    length = math.sqrt(sum(float((g ** 2).sum()) for g in gradients(t.model).values()))
    t.model.zero_grad()
    t.run()
    means, squares, _ = zip(*(p for o in read(tmp_path)['optimizer'] for p in o))
    found = math.sqrt(sum(float((m ** 2).sum()) for m in means)) / (1 - 0.8)
    assert length > 0.5 and found == pytest.approx(limit or length, rel=1e-3)
    assert sum(float(v.sum()) for v in squares) == pytest.approx(0.5 * found ** 2, rel=1e-3)
    losses = [train.evaluate(t.model, x, t.s, t.runtime, 2 * 4)['loss'] for x in (t.data, t.val)]
    assert t.log[-1][1:4] == pytest.approx([*losses, train.learning_rate(1, t.s)])

@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_what_is_not_finite_stops_the_run_before_it_reaches_the_weights(d, tmp_path, what):
    """The error names the step and what it was, and ckpt.pt holds the weights before it."""
    t = trainer(d, tmp_path)
    before = {name: p.clone() for name, p in t.model.state_dict().items()}
    if what == 'loss':
        forward = t.model
        t.forward = lambda **batch: [out * math.nan for out in forward(**batch)]
    else:
        next(t.model.parameters()).register_hook(lambda grad: grad * math.inf)
    with pytest.raises(ValueError, match=f'step 0: the {what} is not finite.*ckpt.pt.* --muon_l'):
        t.run()
    assert all(torch.equal(p, before[name]) for name, p in t.model.state_dict().items())
    assert not different(read(tmp_path), {'model': before})

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_an_overflow_of_float16_skips_the_step_and_halves_the_scale(d, tmp_path, optimizer):
    """No weight of any optimizer moves in that step, and the next one counts."""
    t = trainer(d, tmp_path, 1024.0, optimizer=optimizer, max_iters=1)
    before = {name: p.clone() for name, p in t.model.state_dict().items()}
    handle = t.model.output.weight.register_hook(lambda grad: grad * math.inf)
    t.run()
    assert all(torch.equal(p, before[name]) for name, p in t.model.state_dict().items())
    assert t.runtime.scaler.get_scale() == 512 and t.at.step == 1
    assert not any(kept.any() for o in t.optimizers for state in o.state_dict() for kept in state)
    handle.remove()
    t.s = replace(t.s, max_iters=2)
    t.run()
    moved = [name for name, p in t.model.state_dict().items() if not torch.equal(p, before[name])]
    assert len(moved) > 5 and t.runtime.scaler.get_scale() == 512

class Reads(TorchDispatchMode):
    """Notes an operation with a number or a size as its result: the CPU has to wait for it."""
    found = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.found = function
        return function(*args, **kwargs or {})

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('dataset, preset', [('d', 'gpt2'), ('d', 'nano'), ('d', 'lstm'),
                                             ('text', 't5')])
def test_the_steps_between_lines_of_the_log_read_nothing_from_a_gpu(folders, dataset, preset,
                                                                     optimizer):
    model, data, s, runtime = parts_of(folders / dataset, preset=preset, optimizer=optimizer)
    optimizers = train.OPTIMIZERS[optimizer](optimizer_groups(model, 0.1), s, torch.float32)
    runtime.device, runtime.scaler = 'cuda', torch.amp.GradScaler('cpu', init_scale=8.0)
    batch = get_batch(data, s.objective, model.config.block_size, 0, 4)
    for step, waits in ((1, False), (s.log_interval, True)):
        with Reads() as reads:
            _, loss = model(**batch, num_targets=9)
            runtime.scaler.scale(loss).backward()
            train.optimizer_step(step, loss.detach(), model, optimizers, s, runtime)
        assert bool(reads.found) == waits, reads.found

@pytest.mark.parametrize('preset', ['gpt2', 'lstm'])
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_trains(d, tmp_path, dtype, preset, capsys):
    """Weights stay float32, and the loss falls."""
    end = fit(tmp_path, d, dtype=dtype, preset=preset, max_iters=30, learning_rate=1e-2,
              eval_interval=30)
    assert {t.dtype for t in end['model'].values()} == {torch.float32}
    first, last = (float(row['val_loss']) for row in log_of(tmp_path))
    assert last < first - 0.3 and f'{dtype} on cpu' in capsys.readouterr().out

def test_dropout_is_a_function_of_the_seed_and_the_first_example(d):
    """The generator's state does not count, other micro-batches have other masks."""
    def losses(step, k, seed=5):
        torch.manual_seed(0)
        model, data, s, runtime = parts_of(d, dropout=0.5, batch_size=2,
                                           gradient_accumulation_steps=k)
        data.tokens = np.zeros(200, int)  # all examples are equal
        found = []
        def forward(**batch):
            logits, loss = model(**batch)
            found.append(round(loss.item() * batch['num_targets'], 3))
            return logits, loss
        torch.manual_seed(step + 99 * k)
        train.backward(step, model.train(), forward, data, replace(s, seed=seed), runtime)
        return found
    first = losses(0, 2)
    assert len(set(first)) == 2 and losses(0, 1) + losses(1, 1) == first
    assert losses(0, 2, seed=6) != first

@pytest.mark.parametrize('dataset, preset, what, still', [
    ('classify', 'bert', 'trunk', r'trunk\.'), ('tag', 'gpt2', 'trunk', r'trunk\.'),
    ('tag', 'llama', 'tokens embed', r'trunk\.(tokens|decoder\.embed)'),
    ('text', 'bert', 'tokens embed', r'(tokens|encoder\.embed|output\.weight)'),
    ('text', 'gpt2', 'tokens, embed,blocks.0.',
     r'(tokens|decoder\.embed|decoder\.blocks\.0|output\.weight)'),
    ('qa', 'lstm', 'tokens', r'trunk\.tokens'),
    ('seq2seq', 't5', 'tokens embed blocks.0.',
     r'(tokens|..coder\.embed|..coder\.blocks\.0|output\.weight)')])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_what_is_frozen_stays_bit_for_bit_and_all_else_learns(
        folders, tmp_path, capsys, dataset, preset, what, still, optimizer):
    """Neither a gradient nor weight decay reaches it; what a free run moves besides has moved."""
    flags = {**WIDE, 'preset': preset, 'n_layer': 2, 'weight_decay': 0.5, 'optimizer': optimizer,
             'max_iters': 2, 'dataset': folders / dataset}
    start, free, frozen = (fit(tmp_path / name, **flags | more) for name, more in [
        ('start', {'max_iters': 0}), ('free', {}), ('frozen', {'freeze': what})])
    moved = different(free, start)
    kept = {name for name in moved if re.match(still, name)}
    assert kept and different(frozen, start) == moved - kept
    assert ' frozen), float32' in capsys.readouterr().out

@pytest.mark.parametrize('dataset, preset', [('text', 'bert'), ('tag', 'gpt2'), ('seq2seq', 't5')])
def test_adversarial_training_adds_the_gradient_where_the_embedding_hurts_most(
        folders, dataset, preset):
    """g(w) + g(w + eps g / |g|) over all micro-batches; afterwards the embedding is as before."""
    model, data, s, runtime = parts_of(folders / dataset, preset=preset,
                                       gradient_accumulation_steps=2)
    weight = getattr(model, 'trunk', model).tokens.weight
    before = weight.detach().clone()
    plain = train.backward(0, model, model, data, s, runtime)
    here, g = gradients(model), weight.grad.clone()
    model.zero_grad()
    with torch.no_grad():
        weight += 0.7 * g / g.norm()
    worse = train.backward(0, model, model, data, s, runtime)
    there = gradients(model)
    model.zero_grad()
    with torch.no_grad():
        weight.copy_(before)
    assert not train.fgm_perturbation(0 * g, 0.7).any()  # not NaN, as in the first step of nano
    loss = train.backward(0, model, model, data, replace(s, adversarial=0.7), runtime)
    assert loss == plain < worse and torch.equal(weight, before)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, here[name] + there[name], rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('preset, dataset', [('gpt2', 'd'), ('nano', 'd'), ('t5', 'text')])
def test_what_is_compiled_by_itself_is_compiled_once(folders, preset, dataset):
    """Batches of text have one shape; a number that changes would compile everything again."""
    model, data, s, runtime = parts_of(folders / dataset, preset=preset, dropout=0.1)
    graphs, compiled = [], torch.compile(model, backend='eager')
    for step in range(5):
        found = []
        for forward in (model, compiled):
            model.zero_grad()
            loss = train.backward(step, model, forward, data, s, runtime)
            found.append((loss, gradients(model)))
        torch.testing.assert_close(*found)  # here without generated code: the same loss, gradient
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert 0 < graphs[1] == graphs[4]

# -----------------------------------------------------------------------------
# Evaluation

@pytest.mark.parametrize('dataset, preset', [
    ('d', 'gpt2'), ('d', 'lstm'), ('text', 'bert'), ('d', 'bert'), ('text', 't5'), ('tag', 'bert')])
def test_an_evaluation_is_worked_out_example_by_example(folders, dataset, preset):
    """Loss and accuracy are those of all targets of the split, each once; the mode stays (b2)."""
    model, data, s, runtime = parts_of(folders / dataset, 'val', preset=preset, dropout=0.3)
    scores = train.evaluate(model.train(), data, s, runtime)
    assert model.training
    model.eval()
    with torch.no_grad():
        n = len(data.rows) or data.windows(40)
        nats, right, counts = by_hand(model, data, s, range(n))
        two = by_hand(model, data, s, [0, n - 1])  # of some examples: evenly spread
    assert scores['loss'] == pytest.approx(float(sum(nats[k] / counts[k] for k in nats)), rel=1e-4)
    if data.task:
        return
    assert train.evaluate(model, data, s, runtime, 2)['loss'] == pytest.approx(
        float(sum(two[0][k] / two[2][k] for k in two[0])), rel=1e-4)
    if preset in ('gpt2', 'lstm'):  # the whole text
        size = (Path(f'{data.folder}.val.txt').stat().st_size)
        assert counts['targets'] == len(data.tokens) - 1
        assert scores['perplexity'] == pytest.approx(math.exp(scores['loss']))
        assert scores['bits_per_byte'] == pytest.approx(
            float(nats['targets']) / math.log(2) / size, rel=1e-4)
    else:
        assert scores['accuracy'] == pytest.approx(right['targets'] / counts['targets'])
        pairs = {'next_accuracy': right['next_targets'] / max(1, counts['next_targets'])}
        found = {name: scores[name] for name in scores if 'next' in name}
        assert found == (pairs if counts['next_targets'] else {})

def test_evaluation_does_not_disturb_training(d, tmp_path):
    """As often as one likes, with samples: the weights end the same, dropout included."""
    flags = dict(dropout=0.3, max_iters=5)
    a = fit(tmp_path / 'a', d, eval_interval=1, sample_tokens=9, **flags)
    b = fit(tmp_path / 'b', d, eval_interval=100, **flags)
    assert not different(a, b)

def eval_only(out, capsys, **flags):
    """The line that --eval_only prints, which has to leave the folder as it is."""
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in Path(out).iterdir()}
    capsys.readouterr()
    main({'eval_only': True, 'out_dir': out, **flags})
    assert before == {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in Path(out).iterdir()}
    line, = capsys.readouterr().out.splitlines()
    return line

@pytest.mark.parametrize('dataset, preset, pattern', [
    ('d', 'gpt2', 'val loss N, perplexity N, bits per byte N'),
    ('text', 'bert', 'val loss N, accuracy N, next accuracy N'),
    ('text', 't5', 'val loss N, accuracy N'),
    ('classify', 'bert', 'val loss N, accuracy N, macro f1 N'),
    ('tag', 'gpt2', 'val loss N, precision N, recall N, f1 N'),
    ('qa', 'lstm', 'val loss N, .*f1 N'), ('seq2seq', 'transformer', 'val .*bleu N.*loss N.*')])
def test_eval_only_prints_the_scores_of_any_model_and_writes_nothing(
        folders, tmp_path, capsys, monkeypatch, dataset, preset, pattern):
    """One line, the same for any batch size and after any seed; nothing is written with dropout."""
    real, modes = train.sample.generate, {False}
    monkeypatch.setattr(train.sample, 'generate', lambda model, *more, **how: (
        modes.add(model.training) or real(model, *more, **how)))
    fit(tmp_path, folders / dataset, **WIDE | dict(preset=preset, max_iters=2, sample_tokens=3))
    line = eval_only(tmp_path, capsys)
    assert modes == {False}
    assert re.fullmatch(pattern.replace('N', r'-?[\d.]+'), line), line
    assert line == eval_only(tmp_path, capsys, batch_size=64)

@pytest.mark.parametrize('task, preset', [('classify', 'gpt2'), ('tag', 'bert')])
def test_eval_only_and_score_cut_what_is_too_long_alike(tmp_path, capsys, task, preset):
    """Where the data cut it, although the model has room for more."""
    rows = prepared(tmp_path / 'rows', ROWS[task], task=task, tokenizer='byte', block_size=9)
    fit(tmp_path / 'out', rows, **{**WIDE, 'preset': preset, 'learning_rate': 0.1, 'max_iters': 9})
    _, right = eval_only(tmp_path / 'out', capsys).split(', ', 1)
    train.sample.main([f'--out_dir={tmp_path}/out', f'--score={rows}.val.txt', '--device=cpu'])
    assert right == capsys.readouterr().out.strip()

def test_best_pt_is_the_evaluation_with_the_best_score(d, tmp_path, capsys):
    """The lowest validation loss; --patience ends a run that gets no better."""
    fit(tmp_path, d, learning_rate=0.3, max_iters=60, eval_interval=2, patience=4, warmup_iters=0,
        lr_schedule='constant', optimizer='adamw', grad_clip=0.0)
    losses = {int(row['step']): float(row['val_loss']) for row in log_of(tmp_path)}
    best, last = min(losses, key=losses.get), max(losses)
    at = read(tmp_path, 'best.pt')['progress']
    assert at['step'] == best < last < 60 and -at['best'][1] == pytest.approx(losses[best])
    assert last - best == 4 * 2
    assert re.search(f'stopped at step {last}: the last 4 evaluations.* best validation loss '
                     f'{losses[best]:.4f} at step {best}. ', capsys.readouterr().out)

def test_best_pt_of_a_task_has_its_best_score_and_of_equals_the_lowest_loss(
        folders, tmp_path, capsys):
    """Accuracy decides, then the loss. The steps are small, so that many evaluations tie."""
    turned = re.sub('bad|好', lambda m: '好' if m[0] == 'bad' else 'bad', ROWS['classify'])
    turned = prepared(tmp_path / 'turned', ROWS['classify'], turned, task='classify',
                      tokenizer='byte', block_size=40)
    for folder, best in ((folders / 'classify', -1), (turned, 0)):  # learning right, or wrong
        fit(tmp_path, folder, **{**WIDE, 'preset': 'gpt2', 'learning_rate': 1e-5,
                                 'warmup_iters': 0, 'max_iters': 5, 'eval_interval': 1})
        losses = [float(row['val_loss']) for row in log_of(tmp_path)]
        at = read(tmp_path, 'best.pt')['progress']
        assert -at['best'][1] == pytest.approx(losses[best]) == pytest.approx(min(losses))
        assert f"accuracy {at['best'][0]:.4f} at step {at['step']}. " in capsys.readouterr().out
    for data, preset, by in (('seq2seq', 't5', 'rougeL'), ('classify', 'gpt2', 'macro_f1')):
        fit(tmp_path / by, folders / data, **WIDE | dict(preset=preset, best_by=by, max_iters=0))
        assert f'best validation {by}' in capsys.readouterr().out

def test_target_loss_is_confirmed_on_the_whole_split(tmp_path, capsys):
    """An estimate below it does not end a run, the whole split does, which all losses are of."""
    folder = prepared(tmp_path / 'a', 'a' * 400, 'a' * 9 + 'bcdefgh' * 9, tokenizer='char')
    flags = dict(learning_rate=0.05, eval_iters=1, batch_size=1, eval_interval=5, max_iters=20)
    fit(tmp_path / 'no', folder, target_loss=1.0, **flags)
    fit(tmp_path / 'all', folder, target_loss=1.0, **flags | {'eval_iters': 99})
    losses = [[row['val_loss'] for row in log_of(tmp_path / name)] for name in ('no', 'all')]
    assert losses[0] == losses[1] and float(losses[0][-1]) > 1
    assert 'target loss 1.0 not reached' in capsys.readouterr().out
    fit(tmp_path / 'yes', folder, target_loss=6.0, **flags)
    out = capsys.readouterr().out
    said = re.search(r'target loss 6.0 reached .* at step (\d+): loss (.*), p.* whole split', out)
    at = read(tmp_path / 'yes', 'best.pt')['progress']
    assert int(said[1]) == at['step'] < 20 and float(said[2]) <= 6
    assert -at['best'][1] == pytest.approx(float(said[2]), abs=1e-4)
    saved, best = read(tmp_path / 'yes'), (tmp_path / 'yes/best.pt').read_bytes()
    saved['progress']['best'] = (0.0, 0.0)  # a better one, which must not be lost
    torch.save(saved, tmp_path / 'yes/ckpt.pt')
    fit(tmp_path / 'yes', init_from='resume', target_loss=9.0, max_iters=21)
    assert (tmp_path / 'yes/best.pt').read_bytes() == best

# -----------------------------------------------------------------------------
# Flags and files

def settings_of(out, **flags):
    """The settings of a run that takes no step, in its checkpoint and its config.toml."""
    main({'device': 'cpu', 'out_dir': out, 'max_iters': 0, 'eval_iters': 1, **flags})
    saved = read(out)
    return {**saved['config'], **saved['settings']}

def test_what_counts_more_comes_later(folders, tmp_path):
    """Default < recipe < --config file < flag."""
    (tmp_path / 'c.toml').write_text('preset = "nano"\nbeta1 = 0.5\nbatch_size = 5\nn_layer = 1\n'
                                     'n_embd = 32\nblock_size = 8\nn_head = 2\n')
    s = settings_of(tmp_path, config=tmp_path / 'c.toml', dataset=folders / 'd', batch_size=3)
    recipe = train.RECIPES['pretrain']['nano']
    assert (s['batch_size'], s['beta1'], s['n_layer']) == (3, 0.5, 1)
    assert s['mlp_dim'] == 64  # 256 for 128 channels
    assert s['window'] == '0'  # of 2 4 8 0: the last block sees all, however many there are
    assert {s[name] == recipe[name] for name in ('optimizer', 'learning_rate', 'beta2')} == {True}
    assert s['log_interval'] == Settings().log_interval

@pytest.mark.parametrize('dataset, flags, recipe', [
    ('text', dict(preset='bert'), ('pretrain', 'bert')), ('tag', dict(preset='gpt2'), ('tag', '')),
    ('seq2seq', dict(preset='t5'), ('seq2seq', '')), ('qa', dict(preset='bert'), ('qa', '')),
    ('classify', dict(preset='bert-base'), ('classify', 'bert-base')),
    ('classify', dict(preset='bert', objective='masked_lm'), ('pretrain', 'bert')),
    ('seq2seq', dict(preset='bert', objective='masked_lm', block_size=24), ('pretrain', 'bert'))])
def test_a_run_has_the_recipe_of_its_task_and_preset(folders, tmp_path, dataset, flags, recipe):
    """All of its values, apart from the flags that were given."""
    s = settings_of(tmp_path, dataset=folders / dataset, n_layer=1, n_embd=16, n_head=2,
                    **{'block_size': 40, **flags})
    expected = train.RECIPES[recipe[0]][recipe[1]]
    given = {'max_iters', 'eval_iters'}
    assert {k: s[k] for k in expected if k not in given} == {
        k: v for k, v in expected.items() if k not in given}

def test_a_name_that_is_no_flag_is_refused_in_python_too(d):
    with pytest.raises(ValueError, match='--n_layers belongs to no flag'):
        train.start({'dataset': d, 'device': 'cpu', 'n_layers': 3})
    with pytest.raises(ValueError, match=r'n_layer=3\.0 must be of type int'):
        train.start({'dataset': d, 'device': 'cpu', 'n_layer': 3.0})

def test_every_recipe_is_made_of_good_flags():
    """Every value is allowed, for presets that there are."""
    for rows in train.RECIPES.values():
        assert rows.keys() <= {'', *PRESETS}
        for values in rows.values():
            Settings(**only(Settings, values))
            Config(**only(Config, values))
            assert values.keys() <= {*Settings.__dataclass_fields__, *Config.__dataclass_fields__}

@pytest.mark.parametrize('dataset, preset', [('d', 'llama'), ('text', 't5'), ('classify', 'bert')])
def test_the_config_of_a_run_repeats_it_bit_for_bit(folders, tmp_path, dataset, preset):
    """--config out/config.toml, and another out_dir: weights, settings and log are the same."""
    more = {'vocab_size': 1000} if preset == 't5' else {}  # else other data may have another
    first = fit(tmp_path / 'a', folders / dataset, **{
        **WIDE, **more, 'preset': preset, 'dropout': 0.1, 'eval_interval': 3, 'batch_size': 3})
    assert ('vocab_size' in (tmp_path / 'a/config.toml').read_text()) == (preset == 't5')
    second = fit(tmp_path / 'b', init_from='auto', config=tmp_path / 'a/config.toml')
    again = fit(tmp_path / 'b', init_from='auto', config=tmp_path / 'a/config.toml')  # requeued
    assert not different(first, second) and not different(first, again)
    same_run(tmp_path / 'a', tmp_path / 'b')
    once = {'out_dir', 'config', 'init_from'}
    assert {k: v for k, v in first['settings'].items() if k not in once} == {
        k: v for k, v in second['settings'].items() if k not in once}

@pytest.mark.parametrize('how', [{'preset': 'bert', 'objective': 'masked_lm'},
    {'preset': 'gpt2', 'objective': 'causal_lm', 'label_smoothing': 0.1}])
def test_a_trunk_goes_from_task_to_task_and_a_new_head_comes_on_top(folders, tmp_path, capsys, how):
    """Pre-trained on text of a task, then labels: the trunk is kept bit for bit, the head new."""
    text = fit(tmp_path / 'text', folders / 'classify', **{**WIDE, **how, 'max_iters': 2})
    keep = {k: WIDE[k] for k in ('device', 'dtype', 'batch_size', 'eval_iters', 'sample_tokens')}

    def go(start, out, seed=1, **flags):
        main({**keep, **flags, 'init_from': tmp_path / start, 'out_dir': tmp_path / out,
              'seed': seed, 'max_iters': 0})
        return read(tmp_path / out)

    task = go('text', 'task', seed=2, dataset=folders / 'classify')
    trunk = {name: p for name, p in task['model'].items() if name.startswith('trunk.')}
    assert {name: p.shape for name, p in text['model'].items()} == {
        name.removeprefix('trunk.'): p.shape for name, p in trunk.items()}
    assert all(torch.equal(p, trunk[f'trunk.{name}']) for name, p in text['model'].items())
    assert task['labels'] == ['bad', '好'] and task['config']['task'] == 'classify'
    assert 'a head for classify, of 2 labels: bad, 好' in capsys.readouterr().out
    assert not different(task, go('task', 'same'))       # the same labels: the head stays too
    turned = {name: p.flip(0) if name[:4] == 'head' else p for name, p in task['model'].items()}
    torch.save(task | {'labels': ['好', 'bad'], 'model': turned}, tmp_path / 'turned.pt')
    assert not different(task, go('turned.pt', 'u'))     # nor does their order matter
    one = types.SimpleNamespace(head=torch.nn.Linear(1, 3))
    one.head.bias.data = torch.arange(3.0)
    train.sort_head(one, {'labels': [*'bca']}, types.SimpleNamespace(task='', labels=[*'abc']))
    assert one.head.bias.tolist() == [2, 0, 1]
    answers = go('text', 'answers', seed=2, dataset=folders / 'qa')
    torch.save(answers | {'labels': ['no answer']}, tmp_path / 'other.pt')
    assert not different(answers, go('other.pt', 'q'))   # nor that some questions have no answer
    prepared(tmp_path / 'other', '\n'.join(f'{i % 11}\t{i}' for i in range(42)), task='classify',
             tokenizer='byte', block_size=40)
    go('task', 'others', dataset=tmp_path / 'other')
    assert 'of 11 labels: 0, 1, 10, 2, 3, 4, 5, 6, 7, 8, ...\n' in capsys.readouterr().out
    assert not different(text, go('task', 'back', dataset=folders / 'text'))
    (tmp_path / 'text/ckpt.pt').unlink()                                   # best.pt will do
    again = prepare_data.Settings(tokenizer=str(tmp_path / 'text'))        # the run's
    assert prepare_data.choose_tokenizer(again, '', []).to_dict() == text['tokenizer']
    out, config = tmp_path / 'back', tmp_path / 'back/config.toml'  # which describes that run
    assert eval_only(out, capsys) == eval_only(out, capsys, config=config)
    assert not re.search('objective = "."', config.read_text()), 'other data may need another'

def test_examples_that_just_fit_are_taken(folders, tmp_path):
    data = Data(str(folders / 'seq2seq'), 'train')
    fit(tmp_path, folders / 'seq2seq', **WIDE | dict(max_iters=0, block_size=max(data.lengths) - 1))
    long = prepared(tmp_path / 'long', 'a\tbcdefghijklmn\n' * 9, task='seq2seq', tokenizer='byte')
    with pytest.raises(ValueError, match='an example of 14 tokens'):
        fit(tmp_path / 'no', long, **WIDE | dict(preset='t5', block_size=13))

def test_a_vocabulary_without_special_tokens_grows(folders, tmp_path, capsys):
    """The rows that were there stay, new ones come behind; it is said how many."""
    data = Data(str(folders / 'classify'), 'train')
    model = build(replace(PRESETS['gpt2'], n_layer=1, n_embd=16, n_head=2, block_size=40,
                          vocab_size=data.vocab_size - 7))
    models.save(tmp_path / 'old.pt', model)
    main({'init_from': tmp_path / 'old.pt', 'dataset': folders / 'classify', 'max_iters': 0,
          'out_dir': tmp_path / 'out', 'device': 'cpu'})
    rows = read(tmp_path / 'out')['model']['trunk.tokens.weight']
    assert len(rows) == data.vocab_size and torch.equal(rows[:-7], model.tokens.weight)
    assert '7 rows added' in capsys.readouterr().out

def test_a_new_run_from_a_checkpoint_may_change_what_is_no_weight(d, tmp_path):
    """Its dropout and a smaller block_size; the optimizer and the step begin anew."""
    old = fit(tmp_path / 'old', d)
    main({'init_from': tmp_path / 'old', 'out_dir': tmp_path / 'new', 'dropout': 0.3,
          'block_size': 4, 'max_iters': 0, 'device': 'cpu'})
    new = read(tmp_path / 'new')
    assert (new['config']['block_size'], new['config']['dropout']) == (4, 0.3)
    assert new['progress']['step'] == 0 and not any(t.any() for o in new['optimizer'] for p in o
                                                    for t in p)
    assert new['settings']['dataset'] == d
    name = 'decoder.embed.positions.weight'
    assert different(old, new) == {name}
    assert torch.equal(old['model'][name][:4], new['model'][name])

@pytest.mark.parametrize('dataset, preset', [('d', 'nano'), ('text', 'bert'), ('seq2seq', 't5')])
def test_a_dry_run_says_what_a_run_costs(folders, tmp_path, capsys, dataset, preset):
    """The parameters exactly, and the bytes that weights, gradients and moments really have."""
    flags = {**WIDE, 'preset': preset, 'n_embd': 64, 'dataset': folders / dataset}
    main({**flags, 'dry_run': True, 'max_iters': 10 ** 12, 'out_dir': tmp_path / 'dry'})
    assert not os.listdir(tmp_path)
    out = capsys.readouterr().out
    real = fit(tmp_path / 'real', **flags)
    weights = list(real['model'].values())
    unique = {t.untyped_storage().data_ptr(): t for t in weights}
    n = sum(t.numel() for t in unique.values())
    moments = sum(t.nbytes for o in real['optimizer'] for p in o for t in p)
    said = re.search(r'parameters +([\d,]+): (.*)', out)
    assert int(said[1].replace(',', '')) == n
    assert sum(int(k.replace(',', '')) for k in re.findall(r' ([\d,]+)(?:,|$)', ' ' + said[2])) == n
    c = real['config']  # two products a weight and direction, and those of attention
    table = 0 if c['tied'] else c['vocab_size'] * c['n_embd']
    flops = 6 * (n - table) + 12 * c['n_layer'] * c['n_embd'] * c['block_size']
    assert f"compute    {flops / 1e6:,.1f} MFLOPs a token" in out
    gigabytes = float(re.search(r'moments ([\d.]+)', out)[1])
    assert gigabytes * 1e9 == pytest.approx(8 * n + moments, rel=0.15, abs=6e5)
    epochs = float(re.search(r'([\d.,]+) times the data', out)[1].replace(',', ''))
    counts = json.loads(Path(folders / dataset, 'meta.json').read_text(encoding='utf-8'))['counts']
    per_step = int(re.search(r'tokens +([\d,]+) a step', out)[1].replace(',', ''))
    data = Data(str(folders / dataset), 'train')
    assert per_step == round(4 * (data.lengths.mean() if data.task else 40))
    days, hours, speed = re.search(r'time +(\d+) days?, (\d+):.* at ([\d,]+) G', out).groups()
    done = (int(days) + int(hours) / 24) * 86400 * float(speed.replace(',', '')) * 1e9
    assert done == pytest.approx(flops * per_step * 1e12, rel=0.2)
    assert epochs == pytest.approx(per_step * 1e12 / counts['train']['tokens'], rel=1e-3)

def test_a_run_leaves_its_log_its_config_and_samples(d, tmp_path, capsys, monkeypatch):
    """A row an evaluation in log.csv; sample lines after `    | `; a line for each logged step."""
    monkeypatch.setattr(train, 'plot', lambda log, path: path.touch())
    fit(tmp_path, d, max_iters=7, eval_interval=3, log_interval=2, sample_tokens=12,
        gradient_accumulation_steps=3)
    rows, out = log_of(tmp_path), capsys.readouterr().out
    assert [int(row['step']) for row in rows] == [0, 3, 6, 7]
    assert [*rows[0]] == ['step', 'train_loss', 'val_loss', 'lr', 'tokens', 'seconds']
    assert [int(row['tokens']) for row in rows] == [0, 288, 576, 672]
    assert re.findall(r'iter (\d+): loss [\d.]+, lr .* tok/s, ETA', out) == ['0', '2', '4', '6']
    assert len(re.findall(r'step \d+: train loss .*, val loss ', out)) == 4
    assert out.count('\n    | ') >= 4 and 'done: 7 steps' in out
    files = '.lock ckpt.pt best.pt log.csv config.toml loss.png'
    assert {*os.listdir(tmp_path)} == {*files.split()}
    assert read(tmp_path)['progress']['step'] == 7

def test_a_signal_that_nohup_ignores_stays_ignored(d, tmp_path):
    before = signal.getsignal(signal.SIGINT)  # Ctrl-C interrupts a notebook again, afterwards
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with ThreadPoolExecutor() as pool:  # a thread hears no signals
        pool.submit(fit, tmp_path, d, max_iters=1).result()
    fit(tmp_path, d, max_iters=1)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) == before

def test_the_picture_shows_both_losses_by_name(tmp_path, monkeypatch):
    figure = types.ModuleType('figure')
    figure.Figure = mock.MagicMock()
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', figure)
    train.plot([[0, 5, 6, 0, 0, 0], [9, 3, 4, 0, 0, 0]], tmp_path / 'loss.png')
    (x, y), named = figure.Figure().subplots().plot.call_args
    assert (x.tolist(), y.tolist()) == ([0, 9], [[5, 6], [3, 4]])
    assert named == {'label': ['train loss', 'val loss']}
    figure.Figure.side_effect = ValueError('not a valid value for backend')  # of MPLBACKEND
    train.plot([[0, 5, 6, 0, 0, 0]], tmp_path / 'loss.png')                # ends no run

def test_a_new_run_moves_the_files_of_an_old_one(d, tmp_path, capsys):
    """Nothing is overwritten, and each move is printed."""
    fit(tmp_path, d, max_iters=1)
    for number in ('', '1'):
        if number:  # all files of a run get one number, although the first had no picture
            (tmp_path / 'loss.png').write_text('drawn')
        old = {path: path.read_bytes() for path in tmp_path.iterdir() if '.old' not in path.name}
        fit(tmp_path, d, max_iters=1, seed=f'{number}6')
        out = capsys.readouterr().out
        for path in old.keys() - {tmp_path / '.lock'}:
            moved = path.with_stem(f'{path.stem}.old{number}')
            assert moved.read_bytes() == old[path] and f'moved to {moved}' in out

@pytest.mark.parametrize('preset, dataset, objective', [
    (preset, dataset, objective) for preset in SMALL_PRESETS for dataset, objective in ALL
    if PRESETS[preset].arch in OBJECTIVES[objective].archs])
def test_every_objective_trains_every_preset_that_can_learn_it(
        folders, tmp_path, preset, dataset, objective):
    fit(tmp_path, folders / dataset, **{**WIDE, 'preset': preset, 'objective': objective,
                                        'max_iters': 2, 'optimizer': 'muon', 'eval_iters': 1})
    assert all(math.isfinite(float(row['val_loss'])) for row in log_of(tmp_path))

# -----------------------------------------------------------------------------
# Two processes

RUNS = {  # what one process and two have to agree on
    'micro-batches dealt': dict(dataset='d', batch_size=3, gradient_accumulation_steps=4,
                                grad_clip=0.05),
    'masked, sliced': dict(dataset='text', preset='bert', adversarial=0.5, grad_clip=0.0,
                           max_iters=1, gradient_accumulation_steps=3),
    'labels, Muon': dict(dataset='tag', preset='gpt2', optimizer='muon', freeze='tokens embed'),
    'one window': dict(dataset='d', eval_iters=1, batch_size=2, dropout=0.2,
                       gradient_accumulation_steps=2), }

def run_all(folders, out, *ports):
    """All runs; ports: of each start, since a store of processes is used once."""
    ports = iter(ports)

    def main(flags):
        os.environ.update({'MASTER_PORT': port} if (port := next(ports, '')) else {})
        globals()['main'](flags)

    for name, flags in RUNS.items():
        flags = {**WIDE, 'max_iters': 4, 'eval_interval': 2, 'eval_iters': 3, **flags}
        flags |= dict(dataset=Path(folders, flags['dataset']), out_dir=Path(out, name))
        if name == 'one window':
            main(flags | {'max_iters': 2, 'lr_decay_iters': 4})
            main({'out_dir': flags['out_dir'], 'init_from': 'resume', 'max_iters': 4})
        else:
            main(flags)

def test_processes_on_gpus_can_also_add_up_what_lies_on_a_cpu(monkeypatch):
    groups = []
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(train.dist, 'init_process_group', lambda *names: groups.extend(names))
    monkeypatch.setattr(torch.cuda, 'set_device', print)
    monkeypatch.setattr(train.sample, 'find_device', lambda name: 'cuda')
    Runtime(Settings(device='cuda', dtype='float32'))
    assert {*torch.distributed.BackendConfig(groups[0]).device_backend_map} >= {'cpu', 'cuda'}

def test_a_checkpoint_is_on_all_machines_or_on_none(d, tmp_path, monkeypatch):
    """Else some would go on, and some begin anew. Any number of processes can evaluate."""
    fit(tmp_path, d, max_iters=1)
    monkeypatch.setattr(train.dist, 'init_process_group', print)
    monkeypatch.setattr(train.dist, 'all_reduce', print)  # the others add nothing
    monkeypatch.setenv('WORLD_SIZE', '3')
    train.start({'out_dir': tmp_path, 'eval_only': True})
    with pytest.raises(ValueError, match='is not on all machines: copy it to each'):
        train.start({'out_dir': tmp_path, 'init_from': 'auto'})

@pytest.mark.parametrize('mine, firsts', [(0, 1), (1, 0)])
def test_the_first_machine_knows_whether_there_is_a_best_checkpoint(
        d, tmp_path, monkeypatch, mine, firsts):
    """It alone writes best.pt, and all must know the same score to beat."""
    fit(tmp_path, d, max_iters=1)
    (tmp_path / 'best.pt').rename(tmp_path / ('best.pt' if mine else 'gone'))
    monkeypatch.setattr(train.dist, 'init_process_group', print)
    monkeypatch.setattr(train.dist, 'all_reduce', lambda total: total.add_(1))  # it has ckpt.pt
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    model, s, data, val, checkpoint, runtime = train.start(
        {'out_dir': tmp_path, 'init_from': 'auto'})
    monkeypatch.setattr(train.dist, 'all_reduce', lambda total: total.add_(firsts))
    at = train.Trainer(model, data, val, s, runtime, checkpoint).at
    assert (at.best > train.Progress.best) == bool(firsts)

def test_two_processes_train_evaluate_and_resume_like_one(folders, tmp_path):
    """Same weights and losses up to rounding (b1: no_sync, clipping; b17: uneven validation)."""
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(len(RUNS) + 2)]
    first, *ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    launch = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1',
              f'--master_port={first}', __file__]
    result = subprocess.run([sys.executable, *launch, str(folders), str(tmp_path / 'two'), *ports],
        capture_output=True, encoding='utf-8', timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count('2 processes') == len(RUNS) + 1, 'each line is printed once'
    run_all(folders, tmp_path / 'one')
    for name in RUNS:
        one, two = (tmp_path / n / name for n in ('one', 'two'))
        for row, other in zip(log_of(one), log_of(two), strict=True):
            for column in ('step', 'train_loss', 'val_loss', 'lr', 'tokens'):
                assert float(row[column]) == pytest.approx(float(other[column]), rel=2e-3), name
        ends = [read(out) for out in (one, two)]
        weights = [list(end['model'].values()) for end in ends]
        means = [[p[0] for o in end['optimizer'] for p in o] for end in ends]  # of gradients
        for tensors, tolerance in ((weights, 1e-2), (means, 2e-2)):
            a, b = (torch.cat([t.flatten() for t in side]) for side in tensors)
            assert (a - b).norm() <= tolerance * a.norm(), f'{name}: {(a - b).norm()}, {a.norm()}'

if __name__ == '__main__':
    os.environ['TORCHELASTIC_USE_AGENT_STORE'] = 'False'
    run_all(*sys.argv[1:])
