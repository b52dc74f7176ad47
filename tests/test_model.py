"""
What model.py promises, each promise once: what can be configured; the formulas of the papers,
against torch's own layers or written out by hand; and what holds for every model (MODELS). Tests
give all weights random values (see `awake`): new ones would hide most bugs, as some are zero. The
ids b1 to b16 stand for bugs that really happened in code of this kind.
"""

import dataclasses
import doctest
import math
import os
import pickle
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import awake, close, gradients, one_line, same, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

# isort: off
import model as the_file
import prepare_data
import sample
from model import (
    IGNORE_INDEX, MLP, PRESETS, TASKS, Attention, Block, Config, Dropout, KVCache, Stack,
    attention, attention_mask, attention_weights, build, cross_entropy, distance_buckets, load,
    make_norm, optimizer_groups, resize, rotary_angles, rotate, save, sinusoids, write_file)

C, L, T, V = 32, 3, 16, 50  # of the tiny models: channels, labels, block_size, vocabulary

# The rows of PRESETS (tiny, most published sizes equal their row), other options, and heads.
MODELS = {preset: tiny(preset) for preset in PRESETS
          if '-' not in preset or tiny(preset) != tiny(preset.split('-')[0])} | {
    'gpt2 post-norm': tiny('gpt2', norm_first=False, positions='sinusoids', embedding_norm=True),
    'gpt2 parallel': tiny('gpt2', parallel=True, norm_first=False, activation='geglu'),
    'gpt2 relative': tiny('gpt2', positions='relative', buckets=8, max_distance=10, bias=False),
    'gpt2 no positions': tiny('gpt2', positions='none', window='4'),
    'llama windows': tiny('llama', window='3 0', rope_scaling='llama3 8 1 4 64'),
    'nano tied': tiny('nano', n_kv_head=2, tied=True, scale_output=True, label_smoothing=0.2),
    'bert rotary': tiny('bert', positions='rotary', norm_first=True, segments=0, tied=False),
    'bert windows': tiny('bert', positions='relative', window='4 2', norm='rmsnorm'),
    'bert one segment': tiny('bert', segments=1),
    'encdec rotary': tiny('transformer', positions='rotary', window='0 3', n_kv_head=2,
                          qk_norm=True, parallel=True, activation='swiglu', tied=False),
    't5 smoothed': tiny('t5', label_smoothing=0.1, activation='geglu', tied=False),
    'lstm tied': tiny('lstm', n_layer=1, tied=True)}
MODELS |= {f'{trunk} {task}': replace(MODELS[trunk], task=task, n_labels=0 if task == 'qa' else L)
           for trunk in ('bert', 'gpt2', 'llama windows', 'nano', 'lstm') for task in TASKS}

every_model = pytest.mark.parametrize('name', MODELS)
WRITERS = [name for name, c in MODELS.items() if c.arch != 'bert' and not c.task]  # they write text
every_writer = pytest.mark.parametrize('name', WRITERS)
few = settings(max_examples=3)

def some(*shape):
    """Random ids of tokens."""
    return torch.randint(V, shape)

def make_batch(config, B=3, length=9, lengths=None):
    """Random arguments of forward, with ragged targets. lengths: real tokens of each row."""
    batch, ignored = {'ids': some(B, length)}, lambda n: torch.rand(B, n) < 0.8 * torch.rand(B, 1)
    real = torch.arange(length) < torch.tensor(lengths or [length] * B)[:, None]
    batch |= {'attention_mask': real} if lengths else {}
    if config.segments:
        batch['segments'] = (torch.arange(length) >= length // 2).long().expand(B, -1)
    if config.task == 'classify':
        batch['targets'] = torch.randint(L, (B,))
    elif config.task == 'qa':
        batch['targets'] = (torch.rand(B, 2, length) * real[:, None]).argmax(dim=2)
    elif config.arch == 'encdec':
        batch['decoder_ids'] = some(B, 6)
        batch['targets'] = some(B, 6).masked_fill(ignored(6), IGNORE_INDEX)
    else:
        targets = torch.randint(L if config.task else V, (B, length))
        batch['targets'] = targets.masked_fill(ignored(length) | ~real, IGNORE_INDEX)
    next_targets = config.arch == 'bert' and not config.task
    return batch | ({'next_targets': torch.randint(2, (B,))} if next_targets else {})

def inputs(batch):
    """The batch without what is to be predicted."""
    return {key: t for key, t in batch.items() if 'targets' not in key}

def ignore_all(batch, rows=slice(None)):
    """The batch without any target in these rows."""
    ignored = lambda t: t.clone().index_fill_(0, torch.arange(len(t))[rows], IGNORE_INDEX)
    return {key: ignored(t) if 'targets' in key else t for key, t in batch.items()}

def counts(batch):
    """num_targets (and BERT's num_next_targets) of a batch."""
    return {f'num_{key}': max(1, int((t != IGNORE_INDEX).sum()))
            for key, t in batch.items() if 'targets' in key}

def writing(model, batch):
    """How a model writes after its source: a function ids -> logits (B, T, V), and a cache."""
    source = [batch['ids'], batch['attention_mask']] if model.config.arch == 'encdec' else []
    cache = model.encode(*source) if source else KVCache(model.config.block_size)
    return lambda ids: model(*source, ids)[0], cache

# -----------------------------------------------------------------------------
# Config and PRESETS

def test_rows_of_presets_are_what_history_chose():
    """The choices that no formula below can check, and the published numbers of parameters."""
    facts = {'transformer': 'encdec post relu sinusoids tied', 'palm': 'gpt pre swiglu rotary tied',
             'gpt2': 'gpt pre gelu_tanh learned tied', 't5': 'encdec pre relu relative tied',
             'bert': 'bert post gelu learned tied', 'llama': 'gpt pre swiglu rotary untied',
             'nano': 'gpt pre swiglu rotary untied qk', 'lstm': 'lstm pre gelu_tanh none untied'}
    sizes = {'gpt2-124m': (124_439_808, 1024), 'llama-7b': (6_738_415_616, 2048),
             'palm-8b': (8_632_012_800, 2048), 'bert-base': (110_106_428, 512),
             'transformer-base': (63_082_496, 512), 't5-small': (60_506_624, 512)}
    assert {*facts, *sizes} == {*PRESETS}
    for row, c in PRESETS.items():
        norms, ties = 'pre' if c.norm_first else 'post', 'tied' if c.tied else 'untied'
        found = ' '.join([c.arch, norms, c.activation, c.positions, ties, *['qk'] * c.qk_norm])
        assert found == facts[row.split('-')[0]], row
        if row in sizes:
            with torch.device('meta'):  # counted without memory
                model = build(c)
            assert (sum(p.numel() for p in model.parameters()), c.block_size) == sizes[row], row

def refusal(**values):
    """The one line with which Config refuses these values."""
    return one_line(ValueError, Config, **values)

@pytest.mark.parametrize('field', [f for f in dataclasses.fields(Config)
                                   if type(f.default) in (int, float)], ids=lambda f: f.name)
@given(beyond=st.integers(1, 10 ** 6))
def test_a_value_beyond_the_bounds_of_its_field_is_refused(field, beyond):
    """Whatever the field: one line with its name, the value and the bound; nan and inf, too."""
    name, kind, rules = field.name, type(field.default), field.metadata
    low, high = rules['low'], rules['high']
    for value in (kind(low - beyond), kind(high + beyond)):
        assert refusal(**{name: value}) == f'{name}={value} must be between {low} and {high}'
    for value in (math.nan, math.inf, -math.inf) if kind is float else ():
        assert name in refusal(**{name: value})
    more = dict(arch='lstm') if name == 'n_embd' else {}
    assert getattr(Config(**{name: kind(low)}, **more), name) == low  # is fine

@pytest.mark.parametrize('field', dataclasses.fields(Config), ids=lambda f: f.name)
def test_a_value_of_another_type_or_an_unknown_choice_is_refused(field):
    """True is no number and 1 is not True; whole numbers serve as fractions; choices are listed."""
    name, kind, choices = field.name, type(field.default), field.metadata['choices']
    wrong = {int: ['4', 2.0, True], float: ['0.1', True], bool: [1, 'True'], str: [3, True]}[kind]
    for value in [*wrong, None]:
        message = refusal(**{name: value})
        assert all(word in message for word in (name, repr(value), kind.__name__)), message
    for value in ('小猫', field.default.upper() + ' ') if choices else ():
        message = refusal(**{name: value})
        assert all(word in message for word in (name, value, *choices)), message
    for value in choices:
        assert getattr(replace(Config(n_labels=3), **{name: value}), name) == value
    assert field.metadata['help'] and type(Config(dropout=0).dropout) is float

@pytest.mark.parametrize('values, words', [
    (dict(n_head=5), 'n_embd=128 n_head=5'), (dict(n_kv_head=3), 'n_head=4 n_kv_head=3'),
    (dict(n_kv_head=8), 'n_kv_head=8'), (dict(positions='rotary', head_dim=7), 'rotary 7'),
    (dict(positions='rotary', n_embd=36), 'rotary 9'),
    (dict(positions='sinusoids', n_embd=9, n_head=3), 'sinusoids 9'),
    (dict(positions='relative', buckets=256), 'buckets=256 max_distance=128'),
    *[(dict(window=text), f'window={text}') for text in
      ('', 'all', '-1', '4,4', '4 x', '1.5', '四', '9' * 10)],
    *[(dict(rope_scaling=text), f'rope_scaling={text} FACTOR') for text in
      ('linear 2', 'llama3', 'llama3 8 1 4', 'llama3 8 1 4 64 1', 'llama3 -8 1 4 64',
       'llama3 8 4 4 64', 'llama3 0 1 4 64')],
    (dict(segments=2), 'segments=2 bert'), (dict(task='tag'), 'task=tag n_labels'),
    (dict(task='classify'), 'task=classify n_labels'), (dict(arch='encdec', task='qa'), 'task=qa'),
    (dict(arch='bert', label_smoothing=0.1), 'label_smoothing=0.1'),
    (dict(task='qa', label_smoothing=0.1), 'label_smoothing=0.1')])
def test_fields_that_do_not_fit_together_are_refused(values, words):
    """Before anything is built; replace() checks again."""
    message = refusal(**values)
    assert all(word in message for word in words.split()), message
    with pytest.raises(ValueError):
        replace(PRESETS['gpt2'], **values)

# -----------------------------------------------------------------------------
# Positions

@given(st.integers(1, 40), st.integers(1, 8))
def test_sinusoids_follow_the_formula_of_the_paper(length, pairs):
    """PE(pos, 2i) = sin(pos / 10000^(2i/C)), PE(pos, 2i+1) = cos(the same), one by one."""
    by_hand = [[f(pos / 10000 ** (2 * i / (2 * pairs))) for i in range(pairs)
                for f in (math.sin, math.cos)] for pos in range(length)]
    close(sinusoids(length, 2 * pairs), torch.tensor(by_hand))

@given(st.integers(1, 6), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30),
       st.sampled_from([100.0, 10000.0, 5e5]))
def test_rotary_products_depend_on_the_distance_only(pairs, i, j, shift, theta):
    """A query at i and a key at j score the same when both move on; lengths do not change."""
    torch.manual_seed(0)
    angles = rotary_angles(61, 2 * pairs, theta).double()
    at = lambda x, position: rotate(x, angles[position].cos(), angles[position].sin())
    q, k = torch.randn(2, 2 * pairs, dtype=torch.float64)
    close(at(q, i) @ at(k, j), at(q, i + shift) @ at(k, j + shift), 1e-4)
    close(at(q, i).norm(), q.norm(), 1e-9)
    # by hand, D = 4: channels 0 and 2 rotate by 1 radian a position, channels 1 and 3 by 1/100
    angles, x = rotary_angles(6, 4, 10000.0)[5], torch.tensor([1.0, 2.0, 0.0, 0.0])
    by_hand = [math.cos(5), 2 * math.cos(0.05), math.sin(5), 2 * math.sin(0.05)]
    close(rotate(x, angles.cos(), angles.sin()), torch.tensor(by_hand), 1e-6)
    waves = sinusoids(500, 8)
    torch.set_default_dtype(torch.bfloat16)  # as some loaders do: angles stay precise
    try:
        assert rotary_angles(6, 4, 10000.0)[5].equal(angles) and sinusoids(500, 8).equal(waves)
    finally:
        torch.set_default_dtype(torch.float32)

@given(st.sampled_from([100.0, 10000.0, 5e5]), st.integers(1, 64), st.integers(1, 4),
       st.integers(1, 8), st.integers(16, 10 ** 5))
def test_llama3_scaling_follows_its_formula(theta, factor, low, gap, length):
    """Pairs that rotate slowly become slower, fast ones stay, with a smooth passage between."""
    scaling, by_hand = f'llama3 {factor} {low} {low + gap}.0 {length}', []
    for speed in (theta ** (-2 * i / 12) for i in range(6)):
        kept = min(1, max(0, (length * speed / (2 * math.pi) - low) / gap))
        by_hand.append(8 * (kept * speed + (1 - kept) * speed / factor))
    by_hand = torch.tensor(by_hand)
    close(rotary_angles(9, 12, theta, scaling)[8], by_hand)
    stack = build(tiny('palm', head_dim=12, rope_theta=theta, rope_scaling=scaling)).decoder
    close(stack.rotary[:, 8], torch.stack([by_hand.cos(), by_hand.sin()]))

def bucket(distance, both_sides, buckets=32, max_distance=128):
    """The rule of T5 for one distance, key - query, in plain numbers."""
    right = buckets // 2 if both_sides and distance > 0 else 0
    n = abs(distance) if both_sides else max(0, -distance)
    share = buckets // 2 if both_sides else buckets
    near = share // 2
    ratio = math.log(max(n, near) / near) / math.log(max_distance / near)
    far = min(share - 1, near + int(ratio * (share - near) + 1e-6))
    return right + (n if n < near else far)

@pytest.mark.parametrize('both_sides, known', [
    (True, {0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -15: 9, -16: 10, -90: 14, -91: 15, -500: 15,
            1: 17, 7: 23, 8: 24, 16: 26, 90: 30, 91: 31, 500: 31}),
    (False, {0: 0, -1: 1, -15: 15, -16: 16, -18: 16, -19: 17, -112: 30, -113: 31, -9999: 31,
             1: 0, 500: 0})])
def test_distances_fall_into_the_buckets_of_t5(both_sides, known):
    """One by one while near, then by logarithm; an encoder has two sides; the last is the rest."""
    distance = torch.tensor([list(known)])
    assert distance_buckets(distance, both_sides)[0].tolist() == [*known.values()]
    distance = torch.arange(-300, 301)[None]
    for sizes in ((32, 128), (8, 20), (5, 3), (64, 33), (4, 200)):
        ours = distance_buckets(distance, both_sides, *sizes)[0].tolist()
        assert ours == [bucket(d, both_sides, *sizes) for d in range(-300, 301)], sizes

@pytest.mark.parametrize('positions', Config.__dataclass_fields__['positions'].metadata['choices'])
def test_every_kind_of_positions_tells_the_order_and_none_does_not(positions):
    """Shuffled tokens give shuffled outputs in an encoder only where it has no positions."""
    stack = awake(Stack(tiny('gpt2', positions=positions), nn.Embedding(V, C), causal=False))
    ids, order = some(2, 9), torch.randperm(9)
    difference = (stack(ids)[:, order] - stack(ids[:, order])).abs().max()
    assert difference < 1e-4 if positions == 'none' else difference > 1e-2
    one_line(TypeError, stack, ids, rule=1)  # an input of a fork gets to attention_mask

# -----------------------------------------------------------------------------
# Attention

@given(st.integers(0, 4), st.integers(1, 6), st.integers(0, 4), st.booleans(),
       st.sampled_from([None, torch.bool, torch.uint8, torch.long]))
def test_a_mask_says_exactly_which_keys_a_query_may_see(past, new, window, causal, padded):
    """Key by key: real, not in the future, within the window. Who may see nothing sees all."""
    S = past + new
    real = torch.rand(3, S) < 0.6 if padded else torch.ones(1, S, dtype=torch.bool)
    mask = attention_mask(torch.arange(past, S), torch.arange(S), causal, window,
                          real.to(padded) if padded else None)
    assert mask.dtype == torch.bool and mask.shape == (len(real), 1, new, S)
    for b, rows in enumerate(mask[:, 0].tolist()):
        for i, row in enumerate(rows, start=past):
            allowed = [bool(real[b, j]) and not (causal and j > i) and not 0 < window <= abs(i - j)
                       for j in range(S)]
            assert row == (allowed if any(allowed) else [True] * S), (b, i)

@settings(max_examples=60)
@given(*[st.integers(1, 3)] * 3, *[st.integers(1, 9)] * 3,
       st.sampled_from(['none', 'triangle', 'bool', 'float']), st.sampled_from([None, 1.0, 0.3]))
def test_the_formula_equals_the_fused_kernel(B, G, groups, D, length, S, kind, scale):
    """softmax(q k^T) v for all shapes, masks and scales (b3), in bfloat16 with and without grad."""
    q = torch.randn(B, G * groups, length, D, dtype=torch.float64) * 2
    k, v = torch.randn(2, B, G, S, D, dtype=torch.float64) * 2
    sees = (torch.rand(B, 1, length, S) < 0.6) | (torch.arange(S) == S // 2)
    mask = {'bool': sees, 'float': torch.randn(B, G * groups, length, S)}.get(kind)
    keys, values = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    added, causal = mask.double() if kind == 'float' else mask, kind == 'triangle'
    weights = attention_weights(q, keys, mask, causal, scale)
    fused = F.scaled_dot_product_attention(q, keys, values, added, 0.0, causal, scale=scale)
    close(weights.sum(dim=-1), torch.ones(weights.shape[:-1], dtype=torch.float64), 1e-12)
    close(weights @ values, fused, 1e-10)
    close(attention(q, k, v, Dropout(0.0), mask, causal, scale), fused, 1e-10)
    half = [t.bfloat16().requires_grad_() for t in (q / 2, k / 2, v / 2)]
    truth = attention(*(t.double() for t in half), Dropout(0.0), mask, causal, scale)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            y = attention(*half, Dropout(0.0), mask, causal, scale)
        assert y.dtype == torch.bfloat16 and (y.double() - truth).abs().max() < 0.08

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('S, gradients', [(9, True), (9, False), (516, True)])
def test_dropped_attention_weights_are_those_of_the_formula(dtype, S, gradients):
    """In training a share p of the weights is 0, in each head another, the rest scaled up (b2)."""
    q, k = torch.randn(2, 6, S, 4).to(dtype), torch.randn(2, 3, S, 4).to(dtype)
    v = torch.eye(S, dtype=dtype).expand(2, 3, S, S)                       # y is the weights
    drop, tolerance = Dropout(0.25), 1e-6 if dtype == torch.float32 else 0.02
    weights = attention_weights(q, k.repeat_interleave(2, dim=1), causal=True)
    with torch.set_grad_enabled(gradients):
        y = attention(q.requires_grad_(gradients), k, v, drop, causal=True)
        evaluated = attention(q, k, v, drop.eval(), causal=True)
    close(evaluated, weights, tolerance)
    close(y, torch.where(y != 0, weights / 0.75, 0), tolerance)
    zeroed = (y == 0)[weights > 0].double()
    assert abs(zeroed.mean() - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / len(zeroed)), zeroed.mean()
    assert not torch.equal(y[:, :3] == 0, y[:, 3:] == 0), 'two heads lose the same weights'

@pytest.mark.parametrize('cross', [False, True])
def test_qk_norm_bounds_the_scores(cross):
    """|q k| / sqrt(D) stays below sqrt(D) for inputs of any size; without qk_norm it does not."""
    spread = {}
    for qk_norm in (True, False):
        layer = awake(Attention(tiny('nano', qk_norm=qk_norm), 0)).double()
        layer.recorded, x = [], 30 * torch.randn(2, 9, C, dtype=torch.float64)
        layer(x, memory=x if cross else None)
        weights = layer.recorded[0]
        spread[qk_norm] = (weights.amax(dim=-1) / weights.amin(dim=-1)).log().max().item()
    assert 0.1 < spread[True] <= 2 * 8 ** 0.5 < spread[False], spread

@pytest.mark.parametrize('preset', ['gpt2', 'llama', 't5'])
def test_recorded_weights_are_those_that_make_the_output(preset):
    """So they have a gradient, and recording changes nothing but rounding."""
    layer, x = awake(Attention(tiny(preset), 0)).double(), torch.randn(2, 5, C, dtype=torch.double)
    plain, layer.recorded = layer(x, causal=True), []
    y = layer(x, causal=True)
    close(y, plain, 1e-9)
    gradient, = torch.autograd.grad(y.sum(), layer.recorded)
    assert gradient.shape == (2, layer.config.n_head, 5, 5) and gradient.abs().min() > 0

@given(st.sampled_from([1e-3, 1.0, 100.0]), st.sampled_from([1e-5, 1e-1]), st.booleans())
def test_norms_are_the_formulas_of_the_papers(size, eps, bias):
    """LayerNorm has the biased variance and eps inside the root (b5); RMSNorm subtracts no mean."""
    layer, rms, bare = (awake(make_norm(tiny(preset, norm_eps=eps, bias=bias), 6)).double()
                        for preset in ('gpt2', 'llama', 'nano'))           # bare: without weights
    x = (torch.randn(3, 6, dtype=torch.float64) + 0.5) * size
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    root = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y = (x - mean) / (variance + eps).sqrt()
    close(layer(x), y * layer.weight + (layer.bias if bias else 0), 1e-9)
    close(rms(x), x / root * rms.weight, 1e-9)
    close(bare(x), y, 1e-9)
    assert (layer.bias is not None) == bias and not list(bare.parameters())

# GELU(1) = 1/2 (1 + tanh(sqrt(2/pi) 1.044715)) = 0.841192; the exact one is 0.841345 (b16)
@pytest.mark.parametrize('activation, x, y', [
    ('gelu_tanh', 1, 0.841192), ('gelu', 1, 0.841345), ('relu', 3, 3), ('relu', -3, 0),
    ('relu2', 3, 9), ('relu2', -3, 0), ('swiglu', 1, 0.731059 * 2), ('swiglu', -1, 0.268941 * 2),
    ('geglu', 1, 0.841192 * 2)])
def test_each_activation_gives_the_number_worked_out_by_hand(activation, x, y):
    """One channel, the gate has weight 1 and the layer beside it weight 2 (1 without a gate)."""
    mlp = MLP(Config(n_embd=1, n_head=1, mlp_dim=1, bias=False, activation=activation))
    for name, p in mlp.named_parameters():
        nn.init.constant_(p, 2.0 if mlp.gate is not None and name == 'fc.weight' else 1.0)
    assert abs(mlp(torch.tensor([[float(x)]])).item() - y) < 2e-6

def copy_torch_layer(layer, block):
    """The weights of nn.TransformerEncoderLayer or nn.TransformerDecoderLayer into our Block."""
    norms = filter(None, (block.attn_norm, block.cross_norm, block.mlp_norm))
    pairs = [*zip(norms, (getattr(layer, f'norm{i}', None) for i in (1, 2, 3))),
             (block.mlp.fc, layer.linear1), (block.mlp.proj, layer.linear2)]
    for name, theirs in (('attn', 'self_attn'), ('cross', 'multihead_attn')):
        ours, theirs = getattr(block, name), getattr(layer, theirs, None)
        if ours is not None:
            pairs.append((ours.proj, theirs.out_proj))
            weights, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
            for part, w, b in zip('qkv', weights, biases):
                getattr(ours, part).load_state_dict({'weight': w, 'bias': b})
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())

@settings(max_examples=12)
@given(st.booleans(), st.sampled_from(['relu', 'gelu']), st.integers(1, 9), st.integers(1, 9))
def test_the_transformer_equals_torchs_own(norm_first, activation, S, length):
    """Encoder, decoder, both norm orders (b5), source padding (b3): logits, loss and gradient."""
    model = awake(build(tiny('transformer', norm_first=norm_first, activation=activation,
                             mlp_dim=48)))
    sizes = dict(dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first)
    last = [nn.LayerNorm(C) if norm_first else None for _ in range(2)]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 4, 48, **sizes), 2, last[0],
                                    enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(C, 4, 48, **sizes), 2, last[1])
    for ours, theirs in ((model.encoder, encoder), (model.decoder, decoder)):
        awake(theirs).train()  # in eval mode torch takes a path that writes zeros under padding
        for block, layer in zip(ours.blocks, theirs.layers, strict=True):
            copy_torch_layer(layer, block)
        if norm_first:
            ours.norm.load_state_dict(theirs.norm.state_dict())
    ids, decoder_ids, targets = some(2, S), some(2, length), some(2, length)
    real = torch.arange(S) < torch.tensor([[S], [S // 2 + 1]])
    embed = lambda t: model.tokens.weight[t] * C ** 0.5 + sinusoids(T, C)[:t.size(1)]
    y = decoder(embed(decoder_ids), encoder(embed(ids), src_key_padding_mask=~real),
                tgt_mask=torch.ones(length, length, dtype=torch.bool).triu(1),
                memory_key_padding_mask=~real) @ model.tokens.weight.T
    logits, loss = model(ids, real, decoder_ids, targets)
    close(logits, y, 1e-4)
    a, b = (torch.autograd.grad(t, model.tokens.weight)[0] for t in (
        loss, F.cross_entropy(y.flatten(0, 1), targets.flatten())))
    close(a / b.abs().max(), b / b.abs().max(), 1e-4)

@few
@given(st.integers(1, T))
def test_bert_equals_torchs_own_encoder_between_its_embedding_and_its_head(length):
    """Post-norm, exact GELU, eps 1e-12, no last norm (b5, b16); then the MLM head by hand."""
    model = awake(build(tiny('bert', mlp_dim=48)))
    layer = nn.TransformerEncoderLayer(C, 4, 48, 0.0, 'gelu', 1e-12, batch_first=True)
    theirs = awake(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).train()
    for layer, block in zip(theirs.layers, model.encoder.blocks, strict=True):
        copy_torch_layer(layer, block)
    ids, segments, w = some(2, length), torch.randint(2, (2, length)), model.state_dict()
    real = torch.arange(length) < torch.tensor([[length], [length // 2 + 1]])
    norm = lambda x, name: F.layer_norm(x, (C,), w[f'{name}.weight'], w[f'{name}.bias'], 1e-12)
    x = (w['tokens.weight'][ids] + w['encoder.embed.positions.weight'][:length]
         + w['encoder.embed.segments.weight'][segments])
    h = theirs(norm(x, 'encoder.embed.norm'), src_key_padding_mask=~real)[real]
    h = F.gelu(h @ w['transform.weight'].T + w['transform.bias'])
    logits = norm(h, 'transform_norm') @ w['tokens.weight'].T + w['output.bias']
    close(model(ids, segments, real)[0][real], logits, 1e-4)
    same(model(ids)[0], model(ids, torch.zeros_like(ids))[0])  # no segments: all are 0

def t5_by_hand(model, ids, real, decoder_ids):
    """The logits of T5 from its weights, with a bias for each distance and head."""
    w, far = model.state_dict(), model.config.max_distance
    norm = lambda x, name: F.rms_norm(x, (C,), w[f'{name}.weight'], 1e-6)

    def attend(x, memory, name, biases, hidden):
        q, k, v = (torch.einsum('btc,hdc->bhtd', t, w[f'{name}.{part}.weight'].view(4, 12, C))
                   for t, part in ((x, 'q'), (memory, 'k'), (memory, 'v')))
        weights = (q @ k.transpose(2, 3) + biases).masked_fill(hidden, -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2) @ w[f'{name}.proj.weight'].T

    def run(stack, ids, hidden, memory=None):
        table, x = w[f'{stack}.relative_bias.weight'], w['tokens.weight'][ids]
        buckets = [[bucket(j - i, memory is None, len(table), far) for j in range(ids.size(1))]
                   for i in range(ids.size(1))]
        biases = table[torch.tensor(buckets)].permute(2, 0, 1)             # (H, T, T)
        for name in (f'{stack}.blocks.0', f'{stack}.blocks.1'):
            h = norm(x, f'{name}.attn_norm')
            x = x + attend(h, h, f'{name}.attn', biases, hidden)
            if memory is not None:
                h = norm(x, f'{name}.cross_norm')
                x = x + attend(h, memory, f'{name}.cross', 0, ~real[:, None, None])
            h = F.relu(norm(x, f'{name}.mlp_norm') @ w[f'{name}.mlp.fc.weight'].T)
            x = x + h @ w[f'{name}.mlp.proj.weight'].T
        return norm(x, f'{stack}.norm')
    future = torch.ones(decoder_ids.size(1), decoder_ids.size(1), dtype=torch.bool).triu(1)
    memory = run('encoder', ids, ~real[:, None, None])
    return run('decoder', decoder_ids, future, memory) * C ** -0.5 @ w['tokens.weight'].T

@pytest.mark.parametrize('S, length, buckets, max_distance', [
    (40, 40, 8, 20), (1, 9, 32, 128), (17, 1, 16, 33), (12, 23, 5, 3)])
def test_t5_equals_the_formula_written_out(S, length, buckets, max_distance):
    """One bias table a stack, none in cross-attention (b16), no 1/sqrt(D), output / sqrt(C)."""
    model = awake(build(tiny('t5', block_size=40, buckets=buckets, max_distance=max_distance)))
    model, ids, decoder_ids = model.double(), some(2, S), some(2, length)
    real = torch.arange(S) < torch.tensor([[S], [S // 2 + 1]])
    close(model(ids, real, decoder_ids)[0], t5_by_hand(model, ids, real, decoder_ids), 1e-9)

@pytest.mark.parametrize('norm_first', [True, False])
def test_a_parallel_block_adds_attention_and_mlp_at_once(norm_first):
    """PaLM: x + attention(norm(x)) + MLP(norm(x)); or one norm of the whole sum."""
    block = awake(Block(tiny('palm', norm_first=norm_first), 0))
    x, norm = torch.randn(2, 7, C), block.attn_norm
    h = norm(x) if norm_first else x
    y = x + block.attn(h, causal=True) + block.mlp(h)
    close(block(x, {'causal': True}, {}), y if norm_first else norm(y), 1e-6)

# -----------------------------------------------------------------------------
# What holds for every model: what may see what

SEEN = {name: c for name, c in MODELS.items() if not c.task} | {
    f'{preset} {n_layer}: {window}': tiny(preset, window=window, n_layer=n_layer, positions=kind)
    for preset in ('gpt2', 'bert') for kind in ('learned', 'rotary', 'relative')
    for window, n_layer in [('1', 2), ('3', 1), ('2 3', 3), ('2 0', 1), ('2 0', 2), ('8', 1)]}

@pytest.mark.parametrize('name', SEEN)
def test_a_prediction_depends_on_the_tokens_it_may_see_and_no_others(name):
    """A decoder sees the past, an encoder both sides, W - 1 tokens a block, never padding (b3)."""
    config, n, seen = SEEN[name], 9, []
    model, windows = awake(build(config)), [int(w) for w in config.window.split()]
    windows = [windows[i % len(windows)] for i in range(config.n_layer)]
    far = sum(w - 1 for w in windows) if all(windows) else math.inf
    batch, both = inputs(make_batch(config, 1, 11, lengths=[n])), config.arch == 'bert'
    hook = model.tokens.register_forward_hook(lambda m, args, y: seen.append(y.requires_grad_()))
    logits = model(**batch)[0]
    hook.remove()
    for t in (0, 2, 5):
        found = torch.autograd.grad(logits[0, t].square().sum(), seen, retain_graph=True)
        *source, last = [(g[0].abs().sum(dim=-1) > 0).tolist() for g in found]
        if source:  # an encoder-decoder: the whole source and the past of the target
            assert source == [[True] * n + [False] * 2] and far == math.inf
            assert last == [i <= t for i in range(6)], t
        else:
            assert last == [i < n and (both or i <= t) and abs(i - t) <= far for i in range(11)], t
    if not both:  # other tokens from place 4 on: all before stays equal bit for bit
        key = 'decoder_ids' if config.arch == 'encdec' else 'ids'
        changed = torch.cat([batch[key][:, :4], (batch[key][:, 4:] + 1) % V], dim=1)
        after = model(**batch | {key: changed})[0]
        same(logits[:, :4], after[:, :4])
        assert not torch.equal(logits[:, 4], after[:, 4])

@every_model
@few
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 4))
def test_padding_is_invisible(name, lengths, more):
    """Each row gives what it gives alone, and the ids under the padding do not matter (b3, b10)."""
    model, config = awake(build(MODELS[name])), MODELS[name]
    batch = make_batch(config, len(lengths), max(lengths) + more, lengths)
    ones, real = dict.fromkeys(counts(batch), 1), batch.pop('attention_mask')
    logits, loss = model(**inputs(batch), attention_mask=real)[0], 0
    has_targets = config.arch != 'encdec' and config.task in ('', 'tag')   # each token of ids
    cut = ['ids', 'segments', 'targets'] if has_targets else ['ids', 'segments']
    for i, n in enumerate(lengths):
        row = {key: t[i:i + 1, :n] if key in cut else t[i:i + 1] for key, t in batch.items()}
        loss, theirs = loss + model(**row, **ones)[1], model(**inputs(row))[0][0]
        close(logits[i][tuple(slice(size) for size in theirs.shape)], theirs, 1e-4)
    close(model(**batch, **ones, attention_mask=real)[1], loss, 1e-4)
    other = {key: torch.where(real, t, 1 - t.clamp(max=1)) if key in ('ids', 'segments') else t
             for key, t in inputs(batch).items()}
    changed = model(**other, attention_mask=real)[0]
    same(*(t[real] if has_targets else t for t in (logits, changed)))

@every_model
@pytest.mark.parametrize('half', [False, True])
def test_a_row_of_padding_poisons_nothing(name, half):
    """Everything is finite, in bfloat16 too, and the loss is that of the other rows (b3)."""
    half = half and MODELS[name].arch != 'lstm'  # on many a CPU torch has no LSTM in bfloat16
    model = awake(build(MODELS[name])).train()
    batch = make_batch(model.config, lengths=[0, 5, 8])
    with torch.autocast('cpu', torch.bfloat16, enabled=half):
        assert model(**inputs(batch))[0].isfinite().all()
        loss = model(**batch)[1]
        loss.backward()
        ours = model(**ignore_all(batch, slice(1)))[1]
    alone = model(**{key: t[1:] for key, t in batch.items()})[1]
    close(ours, alone, 0.05 if half else 1e-5)
    assert loss.dtype == torch.float32
    assert all(g.isfinite().all() for g in (loss, *gradients(model).values()))

@given(st.sets(st.integers(0, 5)), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([None, 1, 7]))
def test_cross_entropy_by_hand(ignored, smoothing, num_targets):
    """-log softmax at the targets there are, smoothed, over num_targets (b1, b4, b13)."""
    logits, targets = torch.randn(2, 3, V) * 3, some(2, 3)
    targets.view(-1)[list(ignored)] = IGNORE_INDEX
    p = F.one_hot(targets.clamp(min=0), V) * (1 - smoothing) + smoothing / V
    nats = -(p * logits.log_softmax(-1)).sum(-1)[targets != IGNORE_INDEX]  # (N,)
    loss = cross_entropy(logits, targets, num_targets, smoothing)
    close(loss, nats.sum() / (num_targets or max(1, len(nats))))
    if len(nats) and not num_targets:
        close(loss, F.cross_entropy(logits.mT, targets, label_smoothing=smoothing))

@pytest.mark.parametrize('name', ['gpt2', 'lstm'])
def test_targets_are_given_by_name(name):
    """nanoGPT's model(X, Y) would take Y for a mask."""
    with pytest.raises(TypeError, match='positional'):
        build(tiny(name))(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))

@every_model
@pytest.mark.parametrize('training', [True, False])
def test_the_loss_of_a_model_is_that_of_its_logits_against_the_targets(name, training):
    """Targets are used as given, not shifted again (b4); labels are smoothed in training only."""
    model = awake(build(MODELS[name])).train(training)
    batch, smoothing = make_batch(model.config, lengths=[9, 4, 7]), model.config.label_smoothing
    (logits, loss), _ = model(**inputs(batch)), batch.pop('next_targets', None)
    assert loss is None and logits.shape[:-1] == batch['targets'].shape
    theirs = F.cross_entropy(logits.flatten(0, -2), batch['targets'].flatten(),
                             label_smoothing=smoothing if training else 0.0)
    close(model(**batch)[1], theirs, 1e-4)
    close(model(**batch, num_targets=40)[1], theirs * counts(batch)['num_targets'] / 40, 1e-4)

@every_model
def test_a_batch_without_targets_costs_nothing(name):
    """A loss of 0, gradients of 0, no NaN (b7, b13); with targets every weight has a gradient."""
    model, task = awake(build(MODELS[name])).train(), MODELS[name].task
    batch = make_batch(model.config, lengths=[9, 4, 2])
    loss = model(**ignore_all(batch))[1]
    loss.backward()
    assert loss.item() == 0.0 and not any(g.any() for g in gradients(model).values())
    model(**batch)[1].backward()
    unused = ['transform', 'output.', 'nsp_head'] + ['pooler'] * (task != 'classify')
    unused += ['head.bias'] * (task == 'qa')  # softmax over positions: it shifts all of them alike
    for key, p in model.named_parameters():
        if not task or not any(part in key for part in unused):
            assert p.grad.isfinite().all() and p.grad.any(), f'{key} was forgotten in the wiring'

@given(st.integers(1, 4), st.integers(1, T), st.booleans())
def test_the_loss_of_bert_is_the_sum_of_two(B, length, counted):
    """Logits of the N tokens with a target (N, V), MLM plus NSP, each divided by its number."""
    model, ids = awake(build(tiny('bert'))), some(B, length)
    targets, next_targets = some(B, length), torch.randint(2, (B,))
    targets[torch.rand(B, length) < 0.5] = IGNORE_INDEX
    next_targets[1:].masked_fill_(torch.rand(B - 1) < 0.3, IGNORE_INDEX)
    w, mlm_logits = model.state_dict(), model(ids)[0][targets != IGNORE_INDEX]
    pooled = (model.hidden(ids)[:, 0] @ w['pooler.weight'].T + w['pooler.bias']).tanh()
    nsp_logits = pooled @ w['nsp_head.weight'].T + w['nsp_head.bias']      # (B, 2)
    first, second = {'targets': targets}, {'next_targets': next_targets}
    numbers = dict(num_targets=100, num_next_targets=7) if counted else counts(first | second)
    mlm = F.cross_entropy(mlm_logits, targets[targets != IGNORE_INDEX], reduction='sum')
    nsp = F.cross_entropy(nsp_logits, next_targets, reduction='sum')
    mlm, nsp = mlm / numbers['num_targets'], nsp / numbers['num_next_targets']
    for batch, logits, loss in ((first, mlm_logits, mlm), (second, nsp_logits, nsp),
                                (first | second, mlm_logits, mlm + nsp)):
        ours = model(ids, **batch, **(numbers if counted else {}))
        close(ours[0], logits, 1e-4)
        close(ours[1], loss, 1e-4)
    for label in (0, 1):  # neither class is taken for a missing target (b8)
        loss = model(ids, next_targets=torch.full((B,), label))[1]
        gradient, = torch.autograd.grad(loss, model.nsp_head.bias)
        assert gradient[label] < 0 < gradient[1 - label]

@pytest.mark.parametrize('name', [name for name in MODELS if MODELS[name].task])
def test_a_head_reads_what_its_task_says(name):
    """One linear layer: at [CLS] or the last real token, at every token, or two places (b3)."""
    model, lengths = awake(build(MODELS[name])), torch.tensor([9, 4, 1])
    config, trunk = model.config, build(replace(model.config, task='', n_labels=0)).eval()
    model.trunk.load_state_dict(trunk.state_dict())  # pre-trained weights fit name by name
    batch = inputs(make_batch(config, lengths=lengths.tolist()))
    h, real = trunk.hidden(**batch), batch['attention_mask']               # (B, T, C)
    if config.task == 'classify':
        h = trunk.pool(h) if config.arch == 'bert' else h[torch.arange(3), lengths - 1]
    logits, ours = h @ model.head.weight.T + model.head.bias, model(**batch)[0]
    if config.task == 'qa':  # no answer begins or ends in the padding, however large the logits
        assert (ours * 1000).softmax(dim=-1).transpose(1, 2)[~real].eq(0).all()
        logits, ours = logits[real], ours.transpose(1, 2)[real]
    close(ours, logits)

@every_writer
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
@few
@given(st.sets(st.integers(1, T - 1)), st.integers(1, T), st.booleans())
@torch.no_grad()
def test_a_cache_changes_nothing(name, dtype, tolerance, cuts, length, fixed):
    """Any pieces give the logits of the whole, also as a CUDA graph reads all keys (fixed; b10)."""
    model = awake(build(MODELS[name])).to(dtype)
    batch, ids = make_batch(model.config, 2, 7, lengths=[7, 4]), some(2, length)
    write, cache = writing(model, batch)
    if fixed:
        cache.length = torch.tensor(0)
    at = sorted({0, *(cut for cut in cuts if cut < length), length})
    for start, end in zip(at, at[1:]):
        logits = model.decode(ids[:, start:end], cache)
        close(logits.float(), write(ids)[:, end - 1].float(), tolerance)
        assert cache.length == end and {k.dtype for k, _ in cache.layers.values()} <= {torch.float}
        cache.memory = None if cache.memory is None else cache.memory * math.nan

@every_writer
@pytest.mark.parametrize('shared_source', [False, True])
@torch.no_grad()
def test_reordered_rows_go_on_as_the_rows_they_became(name, shared_source):
    """Beams: row i becomes what row rows[i] was, with its source unless all have the same."""
    model, rows = awake(build(MODELS[name])), torch.tensor([2, 2, 0, 1])
    batch, ids, new = make_batch(model.config, 4, 7, lengths=[7, 2, 5, 6]), some(4, 5), some(4, 2)
    batch = {key: t[torch.arange(4) * (not shared_source)] for key, t in batch.items()}
    _, cache = writing(model, batch)
    model.decode(ids, cache)
    memory = cache.memory
    cache.reorder(rows, source=not shared_source)
    write, _ = writing(model, {key: t[rows] for key, t in batch.items()})
    logits = write(torch.cat([ids[rows], new], dim=1))
    for i in range(2):
        close(model.decode(new[:, i:i + 1], cache), logits[:, 5 + i], 1e-4)
    assert cache.memory is memory or not shared_source, 'the source was copied'

@pytest.mark.parametrize('name', [name for name, c in MODELS.items() if c.arch != 'lstm'])
@torch.no_grad()
def test_a_sequence_beyond_block_size_is_refused(name):
    """Old and new tokens count together, and the cache stays as it was (b10)."""
    model, ids = awake(build(MODELS[name])), some(1, T + 1)
    batch, too_long = (inputs(make_batch(model.config, 1, n, [n])) for n in (T, T + 1))
    calls = [lambda: model(**too_long)]
    assert model(**batch)[0].isfinite().all()
    if name in WRITERS:
        write, cache = writing(model, batch)
        model.decode(ids[:, :T - 1], cache)
        calls.append(lambda: model.decode(ids[:, T - 1:], cache))
    for call in calls:
        with pytest.raises(ValueError, match=f'{T + 1} tokens .* block_size={T}: '):
            call()
    if name in WRITERS:
        close(model.decode(ids[:, T - 1:T], cache), write(ids[:, :T])[:, -1], 1e-4)

@torch.no_grad()
def test_a_compiled_model_reads_a_cache_of_any_length_until_it_is_full():
    """Compiled once for the first token and once for all others; a full cache stays as it was."""
    model, cache, graphs = build(MODELS['gpt2']).eval(), KVCache(6), []
    decode = torch.compile(model.decode, backend='eager')
    for _ in range(6):
        decode(some(1, 1), cache)
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert graphs[1] == graphs[5], graphs
    assert '7 tokens' in one_line(ValueError, model.decode, some(1, 1), cache) and cache.length == 6

@every_model
@torch.no_grad()
def test_a_new_model_knows_nothing_yet(name):
    """The first loss is about ln V, exactly so where the output begins with zeros."""
    larger = {} if MODELS[name].task else dict(vocab_size=2000, n_embd=64)
    config = replace(MODELS[name], **larger)
    batch = make_batch(config)
    batch.pop('next_targets', None)
    classes = {'': 2000, 'qa': 9}.get(config.task, L)
    excess = build(config).eval()(**batch)[1].item() - math.log(classes)
    if config.init == 'zero' and not config.tied and not config.task:
        assert abs(excess) < 1e-4, excess
    else:  # with fan_in logits have size 1 at most
        assert -0.2 < excess < (1.5 if config.init in ('fan_in', 'zero') else 0.2), excess

@pytest.mark.parametrize('init, sizes', [
    ('gpt2', (0.02, 0.02, 0.005, 0.005, 0.02)), ('normal', (0.02,) * 5),
    ('fan_in', (1.0, 1 / 8, 1 / 8, 1 / 16, 1 / 8)), ('zero', (1.0, 1 / 8, 0.0, 0.0, 0.0))])
@pytest.mark.parametrize('scale_attention', [True, False])
def test_initial_weights_have_the_size_that_their_kind_says(init, sizes, scale_attention):
    """Smaller where gpt2 writes to the residual stream, 0 there in zero; biases 0, norms 1."""
    config, found = tiny('gpt2', init=init, n_embd=64, n_layer=8, vocab_size=500, tied=False,
                         scale_attention=scale_attention), {}
    for arch, positions in (('gpt', 'learned'), ('lstm', 'none')):
        for name, p in build(replace(config, arch=arch, positions=positions)).named_parameters():
            if p.dim() < 2:
                assert p.eq(0 if name.endswith('bias') or 'bias_' in name else 1).all(), name
            found.setdefault((p.dim(), '.'.join(name.split('.')[-3:-1])), []).append(p.flatten())
    # without 1/sqrt(D), queries begin smaller, so that no key gets all of the weight
    sizes = [*sizes, sizes[1] if scale_attention else sizes[1] / 4]
    for kind, size in zip(('tokens', 'attn.k', 'attn.proj', 'mlp.proj', 'output', 'attn.q'), sizes):
        assert abs(torch.cat(found[2, kind]).std().item() - size) <= 0.04 * size, kind

@every_model
def test_dropout_acts_in_training_only(name):
    """Evaluated it is as if there were none, bit for bit; in training a seed decides (b2)."""
    model = awake(build(replace(MODELS[name], dropout=0.5)))
    without = build(MODELS[name]).eval()
    without.load_state_dict(model.state_dict())
    batch, runs = inputs(make_batch(model.config)), []
    same(model(**batch)[0], without(**batch)[0])
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(model.train()(**batch)[0])
    same(runs[0], runs[1])
    assert (runs[1] - runs[2]).abs().max() > 1e-2

@pytest.mark.parametrize('name, layers, calls', [
    ('gpt2', 5, 7), ('bert', 5, 7), ('lstm', 1, 2), ('bert tag', 6, 8), ('transformer', 12, 18)])
def test_dropout_is_where_the_papers_have_it(name, layers, calls):
    """What enters the first block, attention weights, what sublayers add, what a head reads."""
    model, zeros, made = awake(build(replace(MODELS[name], dropout=0.5))).train(), [], []
    for m in model.modules():  # what is dropped is what a layer gave, not yet a sum or a norm of it
        m.register_forward_hook(lambda m, args, y: made.extend(y if type(y) is tuple else [y]))
    drops = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    for m in drops:
        m.register_forward_hook(lambda m, args, y: zeros.append(
            (y[args[0] != 0] == 0).float().mean().item()))
        m.register_forward_pre_hook(lambda m, args: zeros.append(0.0) if args[0].dim() == 3 and not
                                    any(args[0] is y for y in made) else None)
    assert name != 'lstm' or model.lstm.dropout == 0.5  # between its layers
    model(**inputs(make_batch(model.config, 16, 9)))
    assert (len(drops), len(zeros)) == (layers, calls) and all(0.4 < z < 0.6 for z in zeros), zeros

@pytest.mark.parametrize('p, zeroed', [(0.001, 1), (0.1, 26), (0.5, 128), (0.9, 230), (1e-9, 1)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dropout_zeroes_its_share_independently_at_each_place(p, zeroed, dtype):
    """A random number serves eight values: each is 0 as often, no two together; the rest grows."""
    x, drop, n, q = torch.rand(8, 40_003).to(dtype).T + 0.5, Dropout(p), 40_003, zeroed / 256
    y = drop(x.requires_grad_())
    y.sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    close(y, torch.where(y != 0, x / (1 - q), 0), tolerance)
    close(x.grad, torch.where(y != 0, torch.ones_like(x) / (1 - q), 0), tolerance)
    assert drop.eval()(x) is x and Dropout(0.0)(x) is x and drop.train()(x[:0, :3]).shape == (0, 3)
    gone = (y == 0).float()
    assert (gone.mean(dim=0) - q).abs().max() < 4.5 * math.sqrt(q * (1 - q) / n), gone.mean(dim=0)
    assert torch.corrcoef(gone.T).fill_diagonal_(0).abs().max().item() < 4.5 / math.sqrt(n)
    for lag in (1, 8, 64, 1024):
        r = ((gone[lag:] - q) * (gone[:-lag] - q)).mean().item() / (q * (1 - q))
        assert abs(r) * math.sqrt(8 * n) < 4.5, lag

@every_model
def test_optimizer_groups_hold_each_weight_once(name):
    """A tied one, too (b5). Vectors do not decay; tables, heads and outputs are no matrices."""
    model = build(MODELS[name])
    trunk = getattr(model, 'trunk', model)
    trunk.scales = torch.nn.Parameter(torch.ones(2, 1, 1))  # as a fork may have: no matrix
    the_file.init_weights(trunk)
    groups = optimizer_groups(model, 0.3)
    kinds = [(id(p), group['name']) for group in groups for p in group['params']]
    tables = ('tokens', 'positions', 'segments', 'relative_bias', 'output', 'head', 'nsp_head')
    expected = [(id(p), 'vectors' if p.dim() != 2 else 'embeddings' if key.split('.')[-2] in tables
                 else 'matrices') for key, p in model.named_parameters()]
    assert sorted(kinds) == sorted(expected) and trunk.scales.eq(1).all()
    assert all(g['params'] and g['weight_decay'] == 0.3 * (g['name'] != 'vectors') for g in groups)
    trunk.tokens.weight.requires_grad_(False)  # a frozen weight takes no part
    assert sum(len(group['params']) for group in optimizer_groups(model, 0.3)) == len(kinds) - 1
    tied = [key for key, p in trunk.named_parameters() if p.shape == (V, C)] == ['tokens.weight']
    assert tied == model.config.tied == (trunk.output.weight is trunk.tokens.weight)

# -----------------------------------------------------------------------------
# Files

@every_model
def test_a_model_comes_back_from_its_file_as_it_was(name, tmp_path):
    """Configuration, weights, loss, gradients, and whatever else was stored with them."""
    model, path = awake(build(replace(MODELS[name], dropout=0.1))), tmp_path / '模型 🙂 é.pt'
    save(path, model, labels=['猫', '🙂', 'e\u0301'], step=7)
    again, checkpoint = load(path)
    assert type(again) is type(model) and again.config == model.config
    assert (checkpoint['labels'], checkpoint['step']) == (['猫', '🙂', 'e\u0301'], 7)
    batch, found = make_batch(model.config), []
    for m in (model, again):
        torch.manual_seed(3)  # of dropout
        loss = m.train()(**batch)[1]
        loss.backward()
        grads = {f'{key} gradient': g for key, g in gradients(m).items()}
        found.append({'loss': loss, **dict(m.named_parameters()), **grads})
    assert found[0].keys() == found[1].keys() and os.listdir(tmp_path) == [path.name]
    for key, t in found[0].items():
        same(t, found[1][key])

@every_model
@few
@given(st.integers(0, 9), st.integers(0, T - 7))
def test_more_tokens_and_fewer_positions_change_nothing_that_was_there(name, added, fewer):
    """New tokens begin near the mean of the old; what a model says of old ones stays (b10)."""
    model, config = awake(build(MODELS[name])), MODELS[name]
    changes = dict(vocab_size=V + added, block_size=T - fewer, dropout=0.25)
    other = resize(model, 'x', **changes).eval()
    assert other.config == replace(config, **changes)
    for (key, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        same(q[:len(p)], p[:len(q)])
        if len(q) > len(p):
            distance = (q[V:] - p.mean(dim=0)).abs().max().item()
            assert len(q) == V + added and 0 < distance < 0.06, (key, distance)
            assert len(q[V:].unique(dim=0)) == added, 'two new tokens are the same'
    batch = inputs(make_batch(config, 2, 7))
    logits = other(**batch)[0]
    assert config.task or logits.size(-1) == V + added
    close(logits if config.task else logits[..., :V], model(**batch)[0], 1e-4)
    batch['ids'][:, 3] = V + added - 1
    assert other(**batch)[0].isfinite().all()

def test_a_folder_means_its_best_checkpoint_else_its_latest(tmp_path):
    """best.pt before ckpt.pt; nothing there is an error that says how to train a model."""
    for path in (tmp_path, tmp_path / 'ckpt.pt', tmp_path / 'nowhere'):
        message = one_line(FileNotFoundError, load, path)
        assert str(path) in message and 'train.py' in message
    save(tmp_path / 'ckpt.pt', build(tiny('gpt2')), step=2)
    assert load(tmp_path)[1]['step'] == 2
    save(tmp_path / 'best.pt', build(tiny('llama')), step=1)
    assert load(str(tmp_path))[1]['step'] == 1
    assert load(tmp_path, block_size=7)[0].config.block_size == 7
    assert 'longer' in one_line(ValueError, resize, build(tiny('transformer')), 'x', block_size=17)
    for changes, words in (dict(block_size=17), 'the 16 that'), (dict(dropout=2.0), 'dropout=2'):
        with pytest.raises(ValueError, match=words):
            load(tmp_path, **changes)

@pytest.mark.parametrize('fault, raised', [
    (ValueError('half'), ValueError), (KeyboardInterrupt(), KeyboardInterrupt),
    (OSError(28, 'No space left on device'), OSError), (RuntimeError('disk'), OSError)])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(fault, raised, tmp_path):
    """Even Ctrl-C: the temporary file lies beside the old one until it is whole, or it is gone."""
    path, folder, model = tmp_path / 'ckpt.pt', tmp_path / 'folder', build(tiny('gpt2'))
    save(path, model, step=1)
    def half(f):
        f.write(b'half a file')
        assert os.path.dirname(f.name) == str(tmp_path) and str(os.getpid()) in f.name
        raise fault
    sizes, link = [], tmp_path / 'link.pt'
    with mock.patch('os.replace', side_effect=[PermissionError, None]), mock.patch(
            'os.fsync', side_effect=lambda n: sizes.append(os.fstat(n).st_size)):
        write_file(path, lambda f: f.write(b'new'))
    with mock.patch('os.replace', side_effect=[PermissionError, None]):
        write_file(path, lambda f: f.write(path.read_bytes()))  # Windows: another program reads it
    assert sizes == [3]                                  # on the disk before it is renamed
    link.symlink_to(path)
    save(link, model, step=1)
    assert link.is_symlink()
    link.unlink()
    with pytest.raises(raised, match=str(path) if raised is OSError else None):
        write_file(path, half)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save(path, model, bad=lambda: 0)
    folder.mkdir()
    for bad in (folder, folder / 'nowhere' / 'ckpt.pt'):
        with pytest.raises(OSError, match=str(bad)):
            save(bad, model)
    save(path, torch.compile(pickle.loads(pickle.dumps(model)), backend='eager'), step=1)
    assert load(path)[1]['step'] == 1 and sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'folder']

def refused_file(path, content):
    """The line with which load refuses a file of these bytes."""
    path.write_bytes(content)
    message = one_line(ValueError, load, path)
    assert str(path) in message
    return message

@given(st.floats(0, 0.999), st.integers(0, 999), st.binary(max_size=60))
def test_a_damaged_file_is_refused(tmp_path, part, place, content):
    """Cut short, one bit flipped, or something else altogether: one line that names the file."""
    path = tmp_path / 'ckpt.pt'
    save(path, build(tiny('gpt2', n_layer=1, n_embd=8)))
    whole = path.read_bytes()
    at = whole.index(b'data/0') + 100 + place                              # in the first tensor
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
    for damaged in (whole[:int(part * len(whole))], flipped, content, 'a poem 小猫'.encode()):
        refused_file(path, damaged)

@pytest.mark.parametrize('damage, words', [
    (lambda c: [1, 2, 3], ''), (lambda c: c['model'], 'config'),
    (lambda c: c.update(labels=tiny('gpt2')), 'Weights only'),
    (lambda c: c.update(config='gpt2'), ''), (lambda c: c.update(model=[1]), ''),
    (lambda c: c['model'].pop('tokens.weight'), 'tokens.weight'),
    (lambda c: c['model'].update({'tokens.weight': torch.zeros(V + 1, C)}), 'tokens.weight'),
    (lambda c: c['model'].update({'more.weight': torch.zeros(2)}), 'more.weight'),
    (lambda c: c['config'].update(n_layer=3), 'blocks.2'),
    (lambda c: c['config'].update(n_layer=10 ** 9), 'n_layer=1000000000'),
    (lambda c: c['config'].update(arch='rwkv'), 'arch=rwkv'),
    (lambda c: c['config'].update({'two\nlines': 1}), 'lines')])
def test_a_checkpoint_that_does_not_fit_is_refused(damage, words, tmp_path):
    """Misshapen or missing parts, unknown fields; objects, the opening of which could run code."""
    path = tmp_path / 'ckpt.pt'
    save(path, build(tiny('gpt2')))
    checkpoint = torch.load(path, weights_only=True)
    changed = damage(checkpoint)
    torch.save(changed if isinstance(changed, (dict, list)) else checkpoint, path)
    assert words in refused_file(path, path.read_bytes())

@pytest.mark.parametrize('module, n', [(the_file, 4), (prepare_data, 3), (sample, 1)])
def test_the_examples_in_the_docstrings_are_true(module, n):
    result = doctest.testmod(module)
    assert result.attempted >= n and result.failed == 0, result
