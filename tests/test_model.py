"""
What model.py promises: the choices of each row of its table, what may look at what, that a cache and padding change
nothing, the formulas against torch's own layers and against numbers worked by hand, and files that open or say why not.

The ids b1 to b16 name bugs that really happened in code of this kind. Freshly initialised weights would hide most of them
(a row of the table even begins with zeros), so the tests give all weights random values: see `awake`.
"""

import dataclasses
import doctest
import inspect
import math
import os
import pickle
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from model import (
    BERT,
    GPT,
    IGNORE,
    LSTM,
    MLP,
    PRESETS,
    TASKS,
    Attention,
    Block,
    Config,
    Dropout,
    EncoderDecoder,
    Stack,
    TaskModel,
    attention,
    attention_weights,
    build,
    cross_entropy,
    distance_buckets,
    dropout,
    load,
    make_norm,
    never_blind,
    optimizer_groups,
    resized,
    rotary_angles,
    rotate,
    save,
    sinusoids,
    write_file,
)

V, T = 50, 16  # vocabulary and block_size of the tiny models
PRESETS = PRESETS | {'near': dataclasses.replace(PRESETS['llama'], window='3 0')}  # no row of history, tested like one
SAME = ('bert-base', 'gpt2-124m', 'transformer-base', 't5-small')  # made tiny, these equal their row
PAIRS = [name for name in PRESETS if PRESETS[name].arch == 'encdec' and name not in SAME]  # a source and a target go in
ROWS = [name for name in PRESETS if name not in (*SAME, *PAIRS)]  # one text goes in
every_preset = pytest.mark.parametrize('preset', ROWS)
every_decoder = pytest.mark.parametrize('preset', [name for name in ROWS if PRESETS[name].arch != 'bert'])
every_pair = pytest.mark.parametrize('preset', PAIRS)
every_gpt = pytest.mark.parametrize('preset', [name for name in ROWS if PRESETS[name].arch == 'gpt'])


def tiny(preset, **changes):
    """A row of the table at a size that takes milliseconds. What the row fixes stays unlike what would be derived."""
    c = PRESETS[preset]
    return dataclasses.replace(c, **{'vocab_size': V, 'block_size': T, 'n_layer': 2, 'n_head': 4, 'n_embd': 32,
                                     'n_kv_head': min(c.n_kv_head, 4), 'head_dim': min(c.head_dim, 12),
                                     'mlp_dim': min(c.mlp_dim, 40), **changes})


def awake(module):
    """Give all weights random values, so that no part is silent. Returns the module, with dropout off."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(1.0 if 'norm' in name and name.endswith('weight') else 0.0, 0.25)
    return module.eval()


def some(*shape):
    """Random ids of tokens."""
    return torch.randint(V, shape)


def close(a, b, tolerance=1e-5):
    difference = (a - b).abs().max().item() if a.numel() else 0.0
    assert a.shape == b.shape and difference <= tolerance, \
        f'{tuple(a.shape)} and {tuple(b.shape)} differ by {difference:.2e}, allowed {tolerance:.0e}'


def same(a, b):
    """Equal bit for bit."""
    assert a.shape == b.shape and torch.equal(a, b), f'{(a != b).sum()} of {a.numel()} values differ'


def one_line(error):
    assert '\n' not in str(error.value), f'more than one line: {error.value}'
    return str(error.value)


def chunks(cuts, length):
    """Pairs (start, end) between the cuts: {3, 5} of 8 -> (0, 3) (3, 5) (5, 8)."""
    at = sorted({0, *(cut for cut in cuts if cut < length), length})
    return zip(at, at[1:])


cuts_of_a_sequence = st.sets(st.integers(1, T - 1))

# -----------------------------------------------------------------------------
# Config and the table


@pytest.mark.parametrize('preset, millions', [('gpt2-124m', 124.439808), ('llama-7b', 6738.415616), ('palm-8b', 8632.0128),
                                              ('bert-base', 110.106428), ('transformer-base', 63.082496),
                                              ('t5-small', 60.506624)])
def test_published_sizes_have_the_published_number_of_parameters(preset, millions):
    """Counted without memory for them: 124M for GPT-2, 6.7B for LLaMA, 8.63B for PaLM, 110M for BERT, 60M for T5."""
    with torch.device('meta'):
        model = build(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == round(millions * 1e6)


def test_rows_of_the_table_fix_what_history_chose():
    """The table in the header of model.py, row by row, as the models are built from it."""
    m = {preset: build(tiny(preset)) for preset in PRESETS}
    for name in ('gpt2', 'palm', 'llama', 'nano'):
        assert type(m[name]) is GPT and m[name].decoder.causal and m[name].config.norm_first, name
    gpt2, palm, llama, nano = (m[name].decoder.blocks[0] for name in ('gpt2', 'palm', 'llama', 'nano'))
    assert (gpt2.attn.sizes, palm.attn.sizes, llama.attn.sizes, nano.attn.sizes) == \
        ((4, 4, 8), (4, 1, 8), (4, 2, 8), (4, 4, 8)), 'heads, key/value heads, channels per head'
    assert palm.parallel and not hasattr(palm, 'mlp_norm') and not (gpt2.parallel or llama.parallel or nano.parallel)
    assert [type(block.attn_norm) for block in (gpt2, palm, llama, nano)] == \
        [nn.LayerNorm, nn.LayerNorm, nn.RMSNorm, nn.RMSNorm]
    assert type(nano.attn.q_norm) is nn.RMSNorm and type(gpt2.attn.q_norm) is nn.Identity
    assert [block.mlp.gated for block in (gpt2, palm, llama, nano)] == [False, True, True, False]
    assert hasattr(m['gpt2'].decoder.embed, 'positions') and not hasattr(m['gpt2'].decoder, 'cos')
    for name in ('palm', 'llama', 'nano'):
        assert hasattr(m[name].decoder, 'cos') and not hasattr(m[name].decoder.embed, 'positions'), name
        assert not any('bias' in key for key, _ in m[name].named_parameters()), name
    assert [m[name].output.weight is m[name].tokens.weight for name in ('gpt2', 'palm', 'llama', 'nano')] == \
        [True, True, False, False], 'tied'
    assert m['palm'].output.scale == 32 ** -0.5 and m['nano'].output.cap == 15 and not m['nano'].output.weight.any()
    assert not any('norm' in key for key, _ in m['nano'].named_parameters()), 'nano norms have no weight'
    assert (gpt2.attn_norm.eps, llama.attn_norm.eps) == (1e-5, 1e-6)
    bert, embed = m['bert'].encoder.blocks[0], m['bert'].encoder.embed
    assert type(m['bert']) is BERT and not m['bert'].encoder.causal and not m['bert'].config.norm_first
    assert bert.attn.sizes == (4, 4, 8) and not bert.mlp.gated and m['bert'].config.activation == 'gelu'
    assert all(type(norm) is nn.LayerNorm and norm.eps == 1e-12 for norm in (embed.norm, bert.attn_norm, bert.mlp_norm))
    assert embed.segments.num_embeddings == 2 and hasattr(embed, 'positions')
    assert m['bert'].output.weight is m['bert'].tokens.weight and m['bert'].output.bias.shape == (V,)
    for name in ('gpt2', 'palm', 'llama', 'nano'):
        embed = m[name].decoder.embed
        assert embed.segments is None and type(embed.norm) is nn.Identity and m[name].output.bias is None, name
    for name in ('transformer', 't5'):
        pair, first = m[name], name == 't5'
        assert type(pair) is EncoderDecoder and not pair.encoder.causal and pair.decoder.causal, name
        assert pair.config.norm_first == first and pair.config.activation == 'relu' and not pair.decoder.blocks[0].parallel
        assert pair.output.weight is pair.tokens.weight and pair.output.bias is None, name
        assert (pair.output.scale, pair.encoder.embed.scale) == ((32 ** -0.5, 1.0) if first else (1.0, 32 ** 0.5)), name
        for stack in (pair.encoder, pair.decoder):
            assert stack.embed.tokens is pair.tokens and not hasattr(stack.embed, 'positions') and not hasattr(stack, 'cos')
            assert hasattr(stack, 'distances') == first != hasattr(stack.embed, 'sinusoids'), name
            assert all(type(norm) is (nn.RMSNorm if first else nn.LayerNorm) and norm.eps == (1e-6 if first else 1e-5)
                       for block in stack.blocks for norm in (block.attn_norm, block.mlp_norm)), name
            assert type(stack.norm) is (nn.RMSNorm if first else nn.Identity), name
            assert all(block.attn.scale == (1.0 if first else None) for block in stack.blocks), name
    assert not any('bias' in key for key, _ in m['t5'].named_parameters()) and m['t5'].config.head_dim == 12
    assert (PRESETS['transformer'].dropout, PRESETS['transformer'].label_smoothing) == (0.1, 0.1)
    assert type(m['lstm']) is LSTM and not any(isinstance(part, Attention) for part in m['lstm'].modules())


@pytest.mark.parametrize('changes, words', [
    ({'n_head': 5, 'n_embd': 128}, 'n_embd=128 n_head=5'), ({'n_head': 4, 'n_kv_head': 3}, 'n_head=4 n_kv_head=3'),
    ({'n_head': 4, 'n_kv_head': 8}, 'n_kv_head=8'), ({'n_kv_head': -1}, 'n_kv_head=-1'), ({'head_dim': -8}, 'head_dim=-8'),
    ({'mlp_dim': -1}, 'mlp_dim=-1'), ({'n_layer': 0}, 'n_layer=0'), ({'n_head': 0}, 'n_head=0'),
    ({'n_embd': 0}, 'n_embd=0'), ({'block_size': 0}, 'block_size=0'), ({'vocab_size': -5}, 'vocab_size=-5'),
    ({'dropout': 1.5}, 'dropout=1.5'), ({'dropout': 1}, 'dropout=1'), ({'dropout': -0.1}, 'dropout=-0.1'),
    ({'dropout': math.nan}, 'dropout=nan'), ({'norm_eps': 0}, 'norm_eps=0'), ({'norm_eps': math.nan}, 'norm_eps=nan'),
    ({'rope_theta': -1.0}, 'rope_theta=-1'), ({'rope_theta': math.inf}, 'rope_theta=inf'),
    ({'logit_cap': math.nan}, 'logit_cap=nan'), ({'logit_cap': -30.0}, 'logit_cap=-30'),
    ({'logit_cap': math.inf}, 'logit_cap=inf'), ({'positions': 'rotary', 'n_embd': 36, 'n_head': 4}, '9'),
    ({'positions': 'rotary', 'head_dim': 7}, '7'), ({'positions': 'sinusoids', 'n_embd': 9, 'n_head': 3}, 'n_embd=9'),
    ({'n_layer': 2.0}, 'n_layer=2.0 int'), ({'n_layer': True}, 'n_layer=True int'), ({'bias': 1}, 'bias=1 bool'),
    ({'dropout': '0.1'}, "dropout='0.1' float"), ({'norm': None}, 'norm=None str'),
    ({'arch': 'bert', 'segments': -1}, 'segments=-1'), ({'n_labels': -1}, 'n_labels=-1'),
    ({'task': 'tag'}, 'task=tag n_labels'), ({'task': 'classify'}, 'task=classify n_labels'),
    ({'label_smoothing': 1.0}, 'label_smoothing=1.0'), ({'label_smoothing': -0.1}, 'label_smoothing=-0.1'),
    ({'label_smoothing': math.nan}, 'label_smoothing=nan'), ({'scale_attention': 0}, 'scale_attention=0 bool'),
    ({'positions': 'relative', 'buckets': 3}, 'buckets=3'), ({'positions': 'relative', 'buckets': 0}, 'buckets=0'),
    ({'positions': 'relative', 'buckets': 258}, 'buckets=258 max_distance=128'), ({'buckets': 8.0}, 'buckets=8.0 int'),
    ({'positions': 'relative', 'max_distance': 0}, 'max_distance=0'), ({'arch': 'encdec', 'segments': 2}, 'segments=2'),
    ({'arch': 'encdec', 'positions': 'sinusoids', 'n_embd': 9, 'n_head': 3}, 'n_embd=9'),
    ({'n_labels': 2.0}, 'n_labels=2.0 int'), ({'task': None}, 'task=None str'),
    ({'rope_scaling': 2.0}, 'rope_scaling=2.0 str'), ({'window': 4}, 'window=4 str'),
    *[({'window': text}, f'window={text} whole') for text in ('', 'all', '-1', '4,4', '4 x', '1.5', '四', '9' * 10)],
    *[({'rope_scaling': text}, f'rope_scaling={text} FACTOR') for text in (
        'linear', 'linear 0', 'linear -2', 'linear 二', 'linear 2 3', 'linear inf', 'linear nan', 'linear 1e999', '4',
        'yarn 4', 'Linear 2', 'default', 'llama3', 'llama3 8 1 4', 'llama3 8 1 4 8192 1', 'llama3 8 1 4 0',
        'llama3 8 4 1 8192', 'llama3 8 4 4 8192')]])  # low above high would slow down the fast pairs instead
def test_config_refuses_what_cannot_be_built_and_names_it(changes, words):
    """One line that names the value, before anything is built; replace() checks again."""
    with pytest.raises(ValueError) as error:
        Config(**changes)
    assert all(word in one_line(error) for word in words.split()), f'{error.value} does not name {words}'
    with pytest.raises(ValueError):
        dataclasses.replace(PRESETS['gpt2'], **changes)


@pytest.mark.parametrize('field', [f for f in dataclasses.fields(Config) if f.metadata['choices']], ids=lambda f: f.name)
def test_every_choice_is_refused_when_unknown(field):
    """The message names the field, the value, and what could have been chosen; the choices themselves are accepted."""
    for value in field.metadata['choices']:
        Config(**{'n_labels': 3, field.name: value})
    for value in {'小猫', '', field.default.upper(), field.default + ' '} - {*field.metadata['choices']}:
        with pytest.raises(ValueError) as error:
            Config(**{field.name: value})
        assert all(word in one_line(error) for word in (field.name, value, *field.metadata['choices'])), error.value


def test_whole_numbers_are_good_enough_for_fractions():
    """--dropout 0 means 0.0, and a config read back from a file is equal to the one written."""
    config = Config(dropout=0, logit_cap=30)
    assert type(config.dropout) is float and Config(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize('text, kept', [('', ''), (' ', ''), ('linear 4', 'linear 4.0'), ('linear  2.50', 'linear 2.5'),
                                        ('linear 1e1', 'linear 10.0'), ('llama3 8 1 4 8192', 'llama3 8.0 1.0 4.0 8192.0')])
def test_one_scaling_of_the_rotation_is_spelled_in_one_way(text, kept):
    """However it was written: so that configurations can be compared, and one read from a file is the one written there."""
    config = Config(positions='rotary', rope_scaling=text)
    assert config.rope_scaling == kept and Config(**dataclasses.asdict(config)) == config, config.rope_scaling


def test_one_window_is_spelled_in_one_way():
    assert Config(window=' 04  0 ') == Config(window='4 0') != Config(window='4')

# -----------------------------------------------------------------------------
# Positions


@given(st.integers(1, 40), st.integers(1, 8))
def test_sinusoids_follow_the_formula_of_the_paper(length, pairs):
    """PE(pos, 2i) = sin(pos / 10000^(2i/C)), PE(pos, 2i+1) = cos(the same), number by number."""
    table, C = sinusoids(length, 2 * pairs), 2 * pairs
    assert table.shape == (length, C)
    for pos in {0, 1, length // 2, length - 1}:
        for i in range(pairs if pos < length else 0):
            angle = pos / 10000 ** (2 * i / C)
            assert abs(table[pos, 2 * i].item() - math.sin(angle)) < 1e-5, (pos, i, table[pos, 2 * i], math.sin(angle))
            assert abs(table[pos, 2 * i + 1].item() - math.cos(angle)) < 1e-5, (pos, i)


def test_a_rotary_pair_is_turned_by_the_angle_of_its_position():
    """By hand, D = 4: channels 0 and 2 turn by 1 radian a position, 1 and 3 by 1/100. LLaMA's halves, not neighbours."""
    angles = rotary_angles(6, 4, 10000.0)                                              # (T, D/2)
    x = torch.tensor([1.0, 2.0, 0.0, 0.0]).expand(1, 1, 6, 4)
    turned = rotate(x, angles.cos(), angles.sin())[0, 0, 5]
    expected = [math.cos(5), 2 * math.cos(0.05), math.sin(5), 2 * math.sin(0.05)]
    close(turned, torch.tensor(expected), 1e-6)
    assert rotate(x.bfloat16(), angles.cos(), angles.sin()).dtype == torch.bfloat16


@given(st.integers(1, 6), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.sampled_from([100.0, 10000.0, 5e5]))
def test_rotary_products_depend_on_distance_only_and_norms_are_kept(pairs, i, j, shift, theta):
    """q at i and k at j, or both moved on by the same amount: the same score. Positions that differ otherwise: another."""
    torch.manual_seed(0)
    angles = rotary_angles(61, 2 * pairs, theta).double()
    at = lambda x, position: rotate(x, angles[position].cos(), angles[position].sin())
    q, k = torch.randn(2, 2 * pairs, dtype=torch.float64)
    close(at(q, i) @ at(k, j), at(q, i + shift) @ at(k, j + shift), 1e-4)  # angles are computed in float32
    close(at(q, i).norm(), q.norm(), 1e-9)
    assert abs(at(q, i) @ at(k, i + 1) - at(q, i) @ at(k, i)) > 1e-6, 'distance 1 and distance 0 give the same score'


@given(st.integers(0, 30), st.integers(1, 9))
def test_a_rotary_layer_does_not_feel_where_it_stands(start, length):
    """Queries and keys turn, values do not: the same tokens further on give the same answers."""
    layer = awake(Attention(tiny('llama')))
    angles, x = rotary_angles(40, 8, 10000.0), torch.randn(2, length, 32)
    first, later = (layer(x, rotary=(part.cos(), part.sin())) for part in (angles[:length], angles[start:start + length]))
    close(later, first, 1e-4)


def test_a_stack_turns_by_the_angles_that_its_config_says():
    """rope_theta and the channels of a head, not of the model, fix how fast."""
    for scaling in ('', 'linear 4', 'llama3 8 1 4 64'):
        stack = Stack(tiny('palm-8b', rope_theta=500.0, rope_scaling=scaling), nn.Embedding(V, 32), causal=True)
        angles = rotary_angles(T, 12, 500.0, scaling)
        close(torch.cat([stack.cos, stack.sin]), torch.cat([angles.cos(), angles.sin()]), 1e-6)


def llama3_speed(speed, factor, low, high, length):
    """The rule of Llama 3 for one pair of channels, in plain numbers: how long is one turn, measured in positions?"""
    turn = 2 * math.pi / speed
    if turn < length / high:
        return speed
    if turn > length / low:
        return speed / factor
    share = (length / turn - low) / (high - low)
    return (1 - share) * speed / factor + share * speed


@given(st.integers(1, 64), st.sampled_from([100.0, 10000.0, 5e5]), st.floats(1, 64), st.floats(0.1, 4), st.floats(0.1, 8),
       st.integers(16, 10 ** 5))
def test_scaled_rotations_follow_the_formulas(pairs, theta, factor, low, gap, length):
    """`linear` slows all pairs down; `llama3` the slow ones and not the fast ones, with a smooth passage between."""
    plain = rotary_angles(9, 2 * pairs, theta)
    close(rotary_angles(9, 2 * pairs, theta, f'linear {factor}'), plain / factor, 1e-5)
    scaled = rotary_angles(9, 2 * pairs, theta, f'llama3 {factor} {low} {low + gap} {length}')
    for i in range(pairs):
        speed = llama3_speed(theta ** (-i / pairs), factor, low, low + gap, length)
        for position in (0, 1, 8):
            found = scaled[position, i].item()
            assert abs(found - position * speed) < 1e-4 * position * speed + 1e-12, (i, position, found, position * speed)


def test_scaled_rotations_worked_by_hand():
    """
    D = 6, theta 10^6: a turn takes 6.28, 628 and 62832 positions. In 1000 positions the first pair turns 159 times and
    stays, the last 0.016 times and is 8 times slower, the middle one 1.59 times: (1.59 - 1) / 3 = 0.197 of its speed stays.
    """
    speeds = rotary_angles(2, 6, 1e6, 'llama3 8 1 4 1000')[1]
    close(speeds, torch.tensor([1.0, 0.01 * (0.80282 / 8 + 0.19718), 0.0001 / 8]), 1e-7)
    close(rotary_angles(9, 6, 1e6, 'linear 4')[8], rotary_angles(9, 6, 1e6)[2], 1e-6)  # 8 is where 2 was

# -----------------------------------------------------------------------------
# Attention


def draw_attention(draw):
    """q, k, v and one of all kinds of masks, in float64."""
    B, G, D = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    H, length, S = G * draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 99)))
    q = torch.randn(B, H, length, D, dtype=torch.float64) * 2
    k, v = torch.randn(2, B, G, S, D, dtype=torch.float64) * 2
    shape = draw(st.sampled_from([(B, 1, 1, S), (1, 1, length, S), (B, H, length, S)]))
    mask = draw(st.sampled_from([None, torch.rand(shape) < 0.6, torch.randn(shape)]))
    if mask is not None and mask.dtype == torch.bool:
        mask[..., draw(st.integers(0, S - 1))] = True  # nobody sees nothing: never_blind takes care of that
    causal = mask is None and draw(st.booleans())
    return q, k, v, mask, causal, draw(st.sampled_from([None, 1.0, 0.3]))


@settings(max_examples=100)
@given(st.data())
def test_the_explicit_formula_equals_the_fused_kernel(data):
    """softmax(q kᵀ) v against F.scaled_dot_product_attention: shapes, masks, causal, grouped heads, scales (b3)."""
    q, k, v, mask, causal, scale = draw_attention(data.draw)
    wide = [t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v)]
    explicit = attention_weights(q, wide[0], mask, causal, scale) @ wide[1]
    added = mask.double() if mask is not None and mask.is_floating_point() else mask
    close(explicit, F.scaled_dot_product_attention(q, *wide, added, is_causal=causal, scale=scale), 1e-10)
    close(explicit, attention(q, k, v, mask, causal, scale), 1e-10)


@settings(max_examples=100)
@given(st.data())
def test_attention_takes_two_roads_to_one_place(data):
    """In bfloat16 with gradients it computes the formula, without them it calls the kernel: the same up to rounding."""
    q, k, v, mask, causal, scale = draw_attention(data.draw)
    q, k, v = (t.bfloat16() for t in (q / 2, k / 2, v / 2))
    truth = attention(q.double(), k.double(), v.double(), mask, causal, scale)
    with torch.no_grad():
        fused = attention(q, k, v, mask, causal, scale)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    plain = attention(*leaves, mask, causal, scale)
    for name, y in (('fused', fused), ('plain', plain)):
        assert y.dtype == torch.bfloat16, (name, y.dtype)
        assert (y.double() - truth).abs().max() < 0.08, f'{name} is off by {(y.double() - truth).abs().max():.3f}'
    plain.sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_mask_and_a_triangle_together_are_never_half_obeyed(dtype):
    """causal=True beside a mask: either both hold or it is an error, on both roads; a mask dropped in silence leaks (b3)."""
    q, k, v = torch.randn(3, 1, 2, 4, 8).to(dtype)
    mask = torch.tensor([True, False, True, True]).expand(1, 1, 4, 4)
    both = mask & torch.ones(4, 4, dtype=torch.bool).tril()
    try:
        y = attention(q.requires_grad_(), k, v, mask, causal=True)
    except (ValueError, RuntimeError):
        return
    close(y.float(), attention(q, k, v, both).float(), 1e-2)


@given(st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_rows_of_weights_sum_to_one_and_the_future_weighs_nothing(length, S, causal):
    """Each query shares out exactly 1, and with causal=True key j > query i gets exactly 0."""
    torch.manual_seed(0)
    weights = attention_weights(torch.randn(2, 3, length, 4) * 3, torch.randn(2, 3, S, 4) * 3, causal=causal)
    close(weights.sum(dim=-1), torch.ones(2, 3, length))
    assert not causal or weights.triu(1).count_nonzero() == 0


@given(st.sampled_from([(4, 1), (4, 2), (6, 3), (6, 2)]), st.sampled_from(['none', 'rotary']), st.booleans())
def test_grouped_heads_equal_repeated_heads(heads, positions, cross):
    """A model with G key/value heads is the one with H of them, each group's rows written H/G times."""
    (H, G), D = heads, 8
    config = tiny('gpt2', n_head=H, n_kv_head=G, n_embd=H * D, positions=positions)
    few = awake(Stack(config, nn.Embedding(V, H * D), causal=True, cross=cross))
    many = awake(Stack(dataclasses.replace(config, n_kv_head=0), nn.Embedding(V, H * D), causal=True, cross=cross))
    weights = few.state_dict()
    for name, w in weights.items():
        if '.qkv.' in name:
            q, k, v = w.split([H * D, G * D, G * D])
            k, v = (t.unflatten(0, (G, D)).repeat_interleave(H // G, dim=0).flatten(0, 1) for t in (k, v))
            weights[name] = torch.cat([q, k, v])
    many.load_state_dict(weights)
    ids, memory = some(2, 9), torch.randn(2, 5, H * D) if cross else None
    close(few(ids, memory=memory), many(ids, memory=memory))


@pytest.mark.parametrize('cross', [False, True])
def test_qk_norm_bounds_every_score(monkeypatch, cross):
    """|q·k| / sqrt(D) stays below sqrt(D) with queries of any size; without qk_norm it does not (also across)."""
    largest = {}

    def spy(q, k, v, *args, **kwargs):
        largest[layer.config.qk_norm] = (q @ k.transpose(-2, -1)).abs().max().item() * 8 ** -0.5
        return attention(q, k, v, *args, **kwargs)

    monkeypatch.setattr('model.attention', spy)
    angles = rotary_angles(10, 8, 10000.0)
    for config in (tiny('nano'), tiny('nano', qk_norm=False)):
        layer = awake(Attention(config))
        layer.config = config
        x = 1000 * torch.randn(2, 10, 32)
        y = layer(x, context=x) if cross else layer(x, rotary=(angles.cos(), angles.sin()))
        assert y.isfinite().all()
    assert largest[True] <= 8 ** 0.5 * 1.001 < 1000 < largest[False], largest

# -----------------------------------------------------------------------------
# Norms, MLP, Block


@given(st.sampled_from([1e-3, 1.0, 100.0]), st.sampled_from([1e-5, 1e-1]), st.booleans())
def test_norms_are_the_formulas_of_the_papers(size, eps, bias):
    """LayerNorm: biased variance, eps inside the root (b5; tiny vectors show it). RMSNorm: the same without the mean."""
    norm = awake(make_norm(tiny('gpt2', norm_eps=eps, bias=bias), 6)).double()
    x = (torch.randn(3, 6, dtype=torch.float64) + 0.5) * size
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    close(norm(x), (x - mean) / (variance + eps).sqrt() * norm.weight + (norm.bias if bias else 0.0), 1e-9)
    close(norm(x), F.layer_norm(x, (6,), norm.weight, norm.bias, eps), 1e-9)
    assert (norm.bias is not None) == bias
    norm = awake(make_norm(tiny('llama', norm_eps=eps), 6)).double()
    close(norm(x), x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight, 1e-9)
    bare = make_norm(tiny('nano', norm_eps=eps), 6)
    assert list(bare.parameters()) == []
    close(bare(x), x / (x.square().mean(-1, keepdim=True) + eps).sqrt(), 1e-9)


# W = 1, W' = 2 where gated. GELU(1) = 1/2 (1 + tanh(sqrt(2/pi) 1.044715)) = 0.841192, the exact one 0.841345 (b16)
@pytest.mark.parametrize('activation, x, y', [
    ('gelu_tanh', 1, 0.841192), ('gelu', 1, 0.841345), ('relu', 3, 3), ('relu', -3, 0), ('relu2', 3, 9), ('relu2', -3, 0),
    ('swiglu', 1, 0.731059 * 2), ('swiglu', -1, 0.268941 * 2), ('geglu', 1, 0.841192 * 2)])
def test_each_activation_gives_the_number_worked_by_hand(activation, x, y):
    """An MLP of one channel with known weights; in gated ones the first half bends and the second is the gate."""
    mlp = MLP(Config(n_embd=1, n_head=1, mlp_dim=1, bias=False, activation=activation))
    with torch.no_grad():
        mlp.fc.weight.copy_(torch.arange(1.0, 1 + len(mlp.fc.weight))[:, None])
        mlp.proj.weight.fill_(1.0)
    result = mlp(torch.tensor([[float(x)]])).item()
    assert abs(result - y) < 2e-6, f'{activation}({x}) = {result}, by hand {y}'


def test_gpt2_has_the_gelu_it_was_trained_with():
    """The tanh one; palm and llama gate with SiLU, nano squares ReLU (b16)."""
    assert [PRESETS[name].activation for name in ('gpt2', 'gpt2-124m', 'palm', 'palm-8b', 'llama', 'llama-7b', 'nano')] == \
        ['gelu_tanh'] * 2 + ['swiglu'] * 4 + ['relu2']


def copy_torch_layer(layer, block, cross):
    """The weights of nn.TransformerEncoderLayer or nn.TransformerDecoderLayer into our Block: it packs q, k, v as we do."""
    norms = [block.attn_norm, block.cross_norm, block.mlp_norm] if cross else [block.attn_norm, block.mlp_norm]
    pairs = [(block.mlp.fc, layer.linear1), (block.mlp.proj, layer.linear2)]
    pairs += [(norm, getattr(layer, f'norm{i + 1}')) for i, norm in enumerate(norms)]
    theirs = [layer.self_attn, layer.multihead_attn] if cross else [layer.self_attn]
    for ours, its in zip([block.attn, block.cross] if cross else [block.attn], theirs, strict=True):
        ours.qkv.load_state_dict({'weight': its.in_proj_weight, 'bias': its.in_proj_bias})
        ours.proj.load_state_dict(its.out_proj.state_dict())
    for ours, its in pairs:
        ours.load_state_dict(its.state_dict())


@settings(max_examples=20)
@given(st.booleans(), st.sampled_from(['relu', 'gelu']), st.booleans(), st.integers(1, 9), st.integers(1, 7))
def test_a_block_equals_torchs_own_layer(norm_first, activation, cross, length, S):
    """Both norm orders (b5), with and without a source, padded; outputs and gradients. Their masks mean the opposite."""
    config = tiny('gpt2', norm_first=norm_first, activation=activation, mlp_dim=48)
    kind = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    layer = awake(kind(32, 4, 48, 0.0, activation, batch_first=True, norm_first=norm_first)).train()
    block = Block(config, cross)
    copy_torch_layer(layer, block, cross)
    x, memory = torch.randn(2, length, 32, requires_grad=True), torch.randn(2, S, 32, requires_grad=True)
    keep, memory_keep = torch.ones(2, length, dtype=torch.bool), torch.ones(2, S, dtype=torch.bool)
    keep[1, 1 + length // 2:], memory_keep[0, 1 + S // 2:] = False, False
    if cross:
        triangle = torch.ones(length, length, dtype=torch.bool).tril()
        ours = block(x, {'causal': True}, {'context': memory, 'mask': memory_keep[:, None, None]})
        theirs = layer(x, memory, tgt_mask=~triangle, memory_key_padding_mask=~memory_keep)
    else:
        ours = block(x, {'mask': keep[:, None, None]})
        theirs = layer(x, src_key_padding_mask=~keep)
    close(ours, theirs, 2e-5)
    weight = torch.randn(32)
    gradients = [torch.autograd.grad((y @ weight).square().sum(), [x, memory] if cross else [x]) for y in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        close(a / b.abs().max(), b / b.abs().max(), 1e-4)


@pytest.mark.parametrize('norm_first', [True, False])
def test_a_parallel_block_adds_both_at_once(norm_first):
    """PaLM: x + attention(norm(x)) + MLP(norm(x)), one norm for both; after the sum, where norms come after."""
    block = awake(Block(tiny('palm', norm_first=norm_first, positions='none')))
    x = torch.randn(2, 7, 32)
    if norm_first:
        h = block.attn_norm(x)
        expected = x + block.attn(h, causal=True) + block.mlp(h)
    else:
        expected = block.attn_norm(x + block.attn(x, causal=True) + block.mlp(x))
    close(block(x, {'causal': True}), expected, 1e-6)


def test_a_last_norm_closes_a_stack_only_where_norms_come_first():
    """With pre-norm the stream was never normalised; with post-norm it already is (b5)."""
    for norm_first, kind in ((True, nn.LayerNorm), (False, nn.Identity)):
        stack = awake(Stack(tiny('gpt2', norm_first=norm_first), nn.Embedding(V, 32), causal=True))
        assert type(stack.norm) is kind, f'norm_first={norm_first}: {stack.norm}'
        x, ids = {}, some(2, 5)
        stack.blocks[-1].register_forward_hook(lambda module, args, y: x.update(last=y))
        y = stack(ids)
        close(y, stack.norm(x['last']), 0.0)

# -----------------------------------------------------------------------------
# Stack and models: what may look at what


@every_decoder
def test_every_decoder_gives_logits_a_loss_and_finite_gradients(preset):
    """Shapes, and a gradient for every weight: a part that nothing flows through was forgotten in the wiring."""
    model = awake(build(tiny(preset, dropout=0.1))).train()
    logits, loss = model(some(3, 11), targets=some(3, 11))
    assert logits.shape == (3, 11, V) and loss.shape == () and model(some(1, 2))[1] is None
    assert model.hidden(some(3, 11)).shape == (3, 11, 32) and model.decode(some(3, 11)).shape == (3, V)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), f'{name} has no gradient'


@every_decoder
@given(st.integers(2, T), st.data())
def test_nothing_leaks_from_the_future(preset, length, data):
    """Change token j: all before j stays equal bit for bit, with and without a cache, and j itself changes (b3)."""
    model = awake(build(tiny(preset)))
    j, cut = data.draw(st.integers(1, length - 1)), data.draw(st.integers(1, length - 1))
    ids = some(2, length)
    changed = ids.clone()
    changed[:, j:] = (ids[:, j:] + 1 + some(2, length - j) % (V - 1)) % V
    before, after = model(ids)[0], model(changed)[0]
    same(before[:, :j], after[:, :j])
    assert not torch.equal(before[:, j], after[:, j]), 'the changed token does not matter at all'
    before, after = (torch.cat([model.hidden(t[:, :cut], cache=cache), model.hidden(t[:, cut:], cache=cache)], dim=1)
                     for t, cache in ((ids, {}), (changed, {})))
    same(before[:, :j], after[:, :j])


@every_decoder
def test_the_loss_of_a_position_sends_no_gradient_to_the_future(preset):
    """The same said by autograd: what stands at t depends on the embeddings up to t, on each of them, and on no other."""
    model = awake(build(tiny(preset)))
    ids, seen = torch.arange(T)[None], {}
    model.tokens.register_forward_hook(lambda module, args, y: seen.update(x=y.requires_grad_()))
    for t in (0, 5, T - 1):
        h = model.hidden(ids)
        gradient, = torch.autograd.grad(h[0, t].square().sum(), seen['x'])
        reached = gradient[0].abs().sum(dim=-1) > 0
        assert reached.tolist() == [i <= t for i in range(T)], f'{t} reads {reached.nonzero().flatten().tolist()}'


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('positions', ['learned', 'rotary', 'relative', 'none'])
@pytest.mark.parametrize('window, n_layer, reach', [('1', 2, 0), ('3', 1, 2), ('3', 2, 4), ('2 4', 3, 5), ('2 0', 1, 1),
                                                    ('2 0', 2, T), ('0 2', 1, T), (str(T - 1), 1, T - 2), (str(T), 1, T)])
def test_a_window_reaches_as_far_as_it_says(window, n_layer, reach, positions, causal):
    """W - 1 tokens back, and in an encoder ahead; those of the blocks add up, each in its turn. Said by autograd (b3)."""
    config = tiny('gpt2', window=window, n_layer=n_layer, positions=positions)
    tokens, seen = nn.Embedding(V, 32), {}
    stack = awake(Stack(config, tokens, causal))
    tokens.register_forward_hook(lambda module, args, y: seen.update(x=y.requires_grad_()))
    for t in (0, T // 2, T - 1):
        gradient, = torch.autograd.grad(stack(torch.arange(T)[None])[0, t].square().sum(), seen['x'])
        reached = (gradient[0].abs().sum(dim=-1) > 0).tolist()
        assert reached == [(i <= t or not causal) and abs(i - t) <= reach for i in range(T)], f'{t} reads {reached}'


def test_a_window_that_holds_everything_is_none():
    """Bit for bit, and by the same fast road."""
    ids = some(2, T)
    same(*(awake(build(tiny('llama', window=window))).hidden(ids) for window in ('0', str(T))))


@every_decoder
@given(cuts_of_a_sequence, st.integers(1, T))
def test_a_cache_changes_nothing(preset, cuts, length):
    """Reading a sequence in any pieces up to block_size gives the logits of reading it whole (b10)."""
    model = awake(build(tiny(preset)))
    ids, cache = some(2, length), {}
    whole = model(ids)[0]
    for start, end in chunks(cuts, length):
        close(model.decode(ids[:, start:end], cache=cache), whole[:, end - 1], 1e-4)


@every_gpt
@given(st.integers(0, T), st.integers(1, 2 * T))
def test_past_block_size_is_an_error_that_names_it(preset, past, new):
    """Old and new tokens count together (b10), and the cache stays as it was, so that a shorter piece still fits."""
    model, cache = awake(build(tiny(preset))), {}
    ids = some(1, past + new)
    if past:
        model.decode(ids[:, :past], cache=cache)
    if past + new <= T:
        model.decode(ids[:, past:], cache=cache)
        return
    with pytest.raises(ValueError) as error:
        model.decode(ids[:, past:], cache=cache)
    assert f'block_size={T}' in one_line(error) and str(past + new) in one_line(error), error.value
    if past < T:
        close(model.decode(ids[:, past:T], cache=cache), model(ids[:, :T])[0][:, -1], 1e-4)


def test_a_cache_grows_without_losing_what_it_held():
    """Beyond 64 tokens, where the room for keys is doubled and copied, one token at a time."""
    model = awake(build(tiny('llama', block_size=150)))
    ids, cache = some(1, 150), {}
    whole = model(ids)[0]
    for t in range(150):
        close(model.decode(ids[:, t:t + 1], cache=cache), whole[:, t], 1e-4)


@every_decoder
@given(st.lists(st.integers(1, 10), min_size=2, max_size=4), cuts_of_a_sequence)
def test_rows_padded_on_the_left_decode_as_each_row_alone(preset, lengths, cuts):
    """With keep, whole or in pieces, also where a piece of a row is all padding; later pieces need no keep (b10)."""
    model, total = awake(build(tiny(preset))), max(lengths) + 3
    keep = torch.arange(total) >= total - 3 - torch.tensor(lengths)[:, None]           # 3 more tokens are real in all rows
    ids, cache = some(len(lengths), total), {}
    alone = [model(ids[i:i + 1, keep[i]])[0][0] for i in range(len(lengths))]          # (real tokens, V)
    close(model.decode(ids, keep), torch.stack([logits[-1] for logits in alone]), 1e-4)
    for start, end in chunks({*cuts, total - 3}, total):
        logits = model.decode(ids[:, start:end], None if start >= total - 3 else keep[:, start:end], cache)
        for i in range(len(lengths)):
            if keep[i, end - 1]:
                close(logits[i], alone[i][keep[i, :end].sum() - 1], 1e-4)


@pytest.mark.parametrize('preset', [*ROWS, *PAIRS])
@given(st.integers(1, T), st.integers(0, 99))
def test_padding_is_invisible_wherever_it_lies(preset, length, seed):
    """Right, left, in holes: real tokens give what they give alone, and the ids under padding do not matter (b3, b10)."""
    model = awake(build(tiny(preset)))
    torch.manual_seed(seed)
    n = torch.randint(1, length + 1, (2,))[:, None]
    keep = torch.cat([torch.arange(length) < n, torch.arange(length) >= length - n, torch.rand(3, length) < 0.6])
    keep[:, length // 2] |= ~keep.any(dim=1)
    ids = some(7, length)
    h = model.hidden(ids, keep)
    same(h[keep], model.hidden(torch.where(keep, ids, some(7, length)), keep)[keep])
    for i in range(7):
        close(h[i, keep[i]], model.hidden(ids[i:i + 1, keep[i]])[0], 1e-4)


@pytest.mark.parametrize('window', ['0', '3'])
@pytest.mark.parametrize('positions', ['learned', 'sinusoids', 'rotary', 'relative', 'none'])
@given(st.integers(1, T), st.integers(0, 99))
def test_padding_is_invisible_to_an_encoder(positions, window, length, seed):
    """Where everything sees everything, only the mask keeps padding out, on the axis of the keys (b3)."""
    stack = awake(Stack(tiny('gpt2', positions=positions, window=window), nn.Embedding(V, 32), causal=False))
    torch.manual_seed(seed)
    keep, ids = torch.rand(4, length) < 0.6, some(4, length)
    keep[:, -1] |= ~keep.any(dim=1)
    h = stack(ids, keep)
    same(h[keep], stack(torch.where(keep, ids, some(4, length)), keep)[keep])
    for i in range(4):
        close(h[i, keep[i]], stack(ids[i:i + 1, keep[i]])[0], 1e-4)


@every_gpt
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9))
def test_a_decoder_reads_its_source_but_not_the_padding_in_it(preset, S, pads, length):
    """Cross-attention has a mask of its own: longer padding or other values in it change nothing, real ones do (b3)."""
    stack = awake(Stack(tiny(preset), nn.Embedding(V, 32), causal=True, cross=True))
    ids, memory = some(2, length), torch.randn(2, S, 32)
    alone = stack(ids, memory=memory)
    keep = (torch.arange(S + pads) < S).expand(2, -1)
    for padding in (torch.zeros(2, pads, 32), 100 * torch.randn(2, pads, 32)):
        close(stack(ids, memory=torch.cat([memory, padding], dim=1), memory_keep=keep), alone, 1e-4)
    assert (stack(ids, memory=memory + 1) - alone).abs().max() > 1e-3, 'the source is not read'


@given(cuts_of_a_sequence, st.sampled_from(['gpt2', 'palm', 'llama', 'nano']))
def test_a_source_is_read_into_the_cache_once(cuts, preset):
    """Decoding in pieces equals decoding whole, and after the first piece the source is not looked at again."""
    stack = awake(Stack(tiny(preset), nn.Embedding(V, 32), causal=True, cross=True))
    ids, memory = some(2, T), torch.randn(2, 5, 32)
    keep, cache = torch.arange(5) < torch.tensor([[3], [5]]), {}
    whole = stack(ids, memory=memory, memory_keep=keep)
    for start, end in chunks(cuts, T):
        given_memory = memory if start == 0 else torch.full_like(memory, 9.0)
        close(stack(ids[:, start:end], memory=given_memory, memory_keep=keep, cache=cache), whole[:, start:end], 1e-4)


@every_decoder
@pytest.mark.parametrize('cached', [False, True])
def test_a_row_of_padding_poisons_nothing(preset, cached):
    """All padding: nothing to see, softmax would be 0/0. Outputs, loss and every gradient stay finite (b3)."""
    model = awake(build(tiny(preset))).train()
    ids, targets, keep = some(3, 8), some(3, 8), torch.ones(3, 8, dtype=torch.bool)
    keep[0], keep[1, :3], keep[2, 3:] = False, False, False
    logits, loss = model(ids, keep, targets.masked_fill(~keep, IGNORE))
    loss.backward()
    assert logits.isfinite().all() and loss.isfinite()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), f'{name} has a gradient that is not finite'
    with torch.no_grad():
        close(cross_entropy(logits[1:], targets.masked_fill(~keep, IGNORE)[1:]), loss)
        if cached:
            cache = {}
            for t in range(8):
                assert model.decode(ids[:, t:t + 1], keep[:, t:t + 1], cache).isfinite().all(), f'position {t}'


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_a_mask_never_blinds_a_query_and_else_says_what_it_was_told(B, S, seed, causal):
    """Every query sees something; one that could see a real token sees exactly the real tokens it may."""
    torch.manual_seed(seed)
    keep = torch.rand(B, S) < 0.4
    visible = torch.ones(S, S, dtype=torch.bool).tril()[None, None] if causal else None
    mask = never_blind(keep, visible)
    assert mask.dtype == torch.bool and mask.shape == (B, 1, S if causal else 1, S) and mask.any(dim=-1).all()
    for b in range(B):
        for i in range(S if causal else 1):
            wanted = [bool(keep[b, j]) and (not causal or j <= i) for j in range(S)]
            assert mask[b, 0, i].tolist() == (wanted if any(wanted) else [True] * S), (keep[b], i)
    assert never_blind(None) is None


@given(st.permutations(range(9)))
def test_without_positions_an_encoder_does_not_know_the_order(order):
    """Shuffle the tokens and the outputs are shuffled alike. A decoder does know: the triangle tells it."""
    ids = some(2, 9)
    config = tiny('gpt2', positions='none')
    encoder, decoder = (awake(Stack(config, nn.Embedding(V, 32), causal)) for causal in (False, True))
    close(encoder(ids)[:, order], encoder(ids[:, order]), 1e-4)
    if order != list(range(9)):
        assert (decoder(ids)[:, order] - decoder(ids[:, order])).abs().max() > 1e-2


@pytest.mark.parametrize('positions', sorted({*Config.__dataclass_fields__['positions'].metadata['choices']} - {'none'}))
def test_every_kind_of_position_tells_the_order(positions):
    """An encoder that is told positions answers the same tokens differently in another order."""
    stack, ids = awake(Stack(tiny('gpt2', positions=positions), nn.Embedding(V, 32), causal=False)), some(2, 9)
    assert (stack(ids).flip(1) - stack(ids.flip(1))).abs().max() > 1e-2


def test_embeddings_are_scaled_and_positions_added():
    """E[id] sqrt(C) + PE(position), as in section 3.4 of the paper; the positions are not scaled."""
    embed = awake(Stack(tiny('gpt2', positions='sinusoids', scale_embedding=True), nn.Embedding(V, 32), causal=True)).embed
    ids, where = some(2, 3), torch.tensor([[0, 1, 2], [4, 4, 15]])
    close(embed(ids, where), embed.tokens.weight[ids] * 32 ** 0.5 + sinusoids(T, 32)[where], 1e-6)

# -----------------------------------------------------------------------------
# Loss, output, initial weights


@given(st.integers(1, 3), st.integers(1, 6), st.sets(st.integers(0, 17)), st.sampled_from([None, 1, 7]))
def test_the_loss_is_the_mean_over_what_is_asked(B, length, ignored, count):
    """-log softmax at the target, picked out by hand; IGNORE counts nowhere; a given count divides instead (b1, b4)."""
    torch.manual_seed(0)
    logits, targets = torch.randn(B, length, V) * 3, some(B, length)
    targets.view(-1)[[i for i in ignored if i < B * length]] = IGNORE
    nats = [-logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(B) for t in range(length) if targets[b, t] != IGNORE]
    loss = cross_entropy(logits, targets, count)
    assert abs(loss.item() - sum(nats) / (count or max(1, len(nats)))) < 1e-4, (loss, nats)
    if nats and count is None:
        close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_a_batch_that_asks_nothing_costs_nothing():
    """All targets ignored: the loss is 0 and its gradient 0, where a mean would be NaN."""
    model = awake(build(tiny('gpt2')))
    _, loss = model(some(2, 5), targets=torch.full((2, 5), IGNORE))
    loss.backward()
    assert loss.item() == 0.0 and all(p.grad.count_nonzero() == 0 for p in model.parameters())


def test_the_loss_of_half_precision_logits_is_computed_in_float32():
    """Summing thousands of bfloat16 losses in bfloat16 would stop at the 256th."""
    logits = torch.randn(2000, V).bfloat16()
    targets = some(2000)
    close(cross_entropy(logits, targets), F.cross_entropy(logits.double(), targets).float(), 1e-4)


@every_decoder
def test_targets_are_used_as_given_and_not_shifted_again(preset):
    """The loss of a model is that of its logits against the targets, position by position (b4)."""
    model, ids = awake(build(tiny(preset))), some(2, 9)
    targets = some(2, 9)
    logits, loss = model(ids, targets=targets)
    by_hand = sum(-logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(2) for t in range(9)) / 18
    close(loss, by_hand, 1e-4)
    for t in (0, 8):  # both ends are asked
        only = torch.full_like(targets, IGNORE)
        only[:, t] = targets[:, t]
        close(model(ids, targets=only)[1], F.cross_entropy(logits[:, t], targets[:, t]), 1e-4)


@settings(max_examples=15)
@given(st.sampled_from(ROWS), st.integers(1, 5), st.integers(0, 99))
def test_micro_batches_with_counts_add_up_to_one_big_batch(preset, size, seed):
    """Losses and gradients, with rows of very unequal numbers of asked targets: no mean of means (b1). BERT counts two."""
    model = awake(build(tiny(preset)))
    torch.manual_seed(seed)
    ids, targets = some(5, 8), some(5, 8)
    targets[torch.rand(5, 8) < torch.rand(5, 1)] = IGNORE
    batch = {'ids': ids, 'targets': targets}
    if preset == 'bert':
        batch['next_targets'] = torch.tensor([0, 1, IGNORE, 1, 0])
    counts = {key: max(1, int((t != IGNORE).sum())) for key, t in batch.items() if key != 'ids'}
    total = []
    for step in (5, size):
        model.zero_grad()
        losses = [model(**{key: t[i:i + step] for key, t in batch.items()}, counts=counts if step < 5 else None)[1]
                  for i in range(0, 5, step)]
        sum(losses).backward()
        total.append([sum(losses).detach()] + [p.grad.clone() for p in model.parameters()])
    for big, small in zip(*total, strict=True):
        close(big, small, 1e-4 * max(1.0, big.abs().max().item()))


@every_preset
def test_tied_weights_are_one_tensor_and_counted_once(preset):
    """The output layer is the embedding or has a matrix of its own; both uses send their gradient to a tied one (b5)."""
    model = awake(build(tiny(preset)))
    tied = model.output.weight.data_ptr() == model.tokens.weight.data_ptr()
    assert tied == PRESETS[preset].tied
    tables = [p for p in model.parameters() if p.shape == (V, 32)]
    assert len(tables) == (1 if tied else 2), [p.shape for p in tables]
    ids = torch.full((1, 4), 7)
    model(ids, targets=ids)[1].backward()
    rows = model.tokens.weight.grad.abs().sum(dim=1) > 0
    assert rows.sum() == (V if tied else 1), f'{rows.sum()} rows of the embedding have a gradient'


@given(st.sampled_from([0.0, 1.0, 15.0]), st.booleans(), st.booleans())
def test_logits_are_scaled_and_capped_by_the_formula(cap, scale, tied):
    """cap tanh(h W / sqrt(C) / cap): never beyond the cap, and nearly untouched where small. 0 means no cap."""
    model = awake(build(tiny('gpt2', logit_cap=cap, scale_output=scale, tied=tied)))
    h = 20 * torch.randn(2, 5, 32)
    plain = h @ model.output.weight.T / (32 ** 0.5 if scale else 1.0)
    logits = model.output(h)
    close(logits, cap * torch.tanh(plain / cap) if cap else plain, 1e-4)
    if cap:
        assert logits.abs().max() <= cap < plain.abs().max(), (logits.abs().max(), plain.abs().max())
        assert model.bfloat16().output(h.bfloat16()).dtype == torch.float32, 'tanh of half a precision'


# PaLM's embeddings have size 1 and are tied, so a token prefers itself at first: its row starts higher, as published.
@every_preset
def test_a_new_model_knows_nothing_yet(preset):
    """The first loss is close to ln V: all tokens are equally likely. (Measured: PaLM 0.3 to 1 above, others to 0.05.)"""
    config = tiny(preset, vocab_size=2000, n_embd=64)
    with torch.no_grad():
        loss = build(config)(torch.randint(2000, (4, T)), targets=torch.randint(2000, (4, T)))[1].item()
    excess = loss - math.log(2000)
    low, high = (0.1, 1.5) if config.parallel else (-1e-3, 1e-3) if config.init == 'zero' else (-0.1, 0.1)
    assert low < excess < high, f'{excess:.4f} above ln V'


@pytest.mark.parametrize('init', ['gpt2', 'normal', 'fan_in', 'zero'])
def test_each_kind_of_initial_weights_has_the_size_it_says(init):
    """Residual projections are smaller in gpt2 (0.02 / sqrt(2 layers)) and nothing in zero; biases 0, norms 1."""
    config = tiny('gpt2', init=init, n_embd=64, n_layer=8, vocab_size=500, tied=False)
    model = build(config)
    blocks = model.decoder.blocks
    size = {'gpt2': (0.02, 0.02, 0.005, 0.005, 0.02), 'normal': (0.02,) * 5, 'fan_in': (1.0, 1 / 8, 1 / 8, 1 / 16, 1 / 8),
            'zero': (1.0, 1 / 8, 0.0, 0.0, 0.0)}[init]
    parts = {'tokens': [model.tokens], 'qkv': [b.attn.qkv for b in blocks], 'attn.proj': [b.attn.proj for b in blocks],
             'mlp.proj': [b.mlp.proj for b in blocks], 'output': [model.output]}
    for wanted, (name, modules) in zip(size, parts.items(), strict=True):
        std = torch.cat([m.weight.flatten() for m in modules]).std().item()
        assert abs(std - wanted) <= 0.04 * wanted, f'{name}: standard deviation {std:.5f}, wanted {wanted}'
    for name, p in model.named_parameters():
        if p.dim() < 2:
            same(p.data, torch.zeros_like(p) if name.endswith('bias') else torch.ones_like(p))


def test_an_lstm_starts_small_and_without_biases():
    """nn.LSTM names its biases bias_ih_l0 and its matrices weight_ih_l0: both must be found."""
    for name, p in build(tiny('lstm', init='normal')).named_parameters():
        std = p.std().item()
        assert std == 0 if p.dim() < 2 else 0.018 < std < 0.022, f'{name}: {std}'

# -----------------------------------------------------------------------------
# Dropout and precision


@every_preset
def test_dropout_acts_in_training_and_never_at_evaluation(preset):
    """Evaluated twice it is equal bit for bit, and equal to a model without dropout; trained twice it is not (b2)."""
    model, ids = awake(build(tiny(preset, dropout=0.5))), some(2, 9)
    without = build(tiny(preset))
    without.load_state_dict(model.state_dict())
    same(model(ids)[0], model(ids)[0])
    same(model(ids)[0], without.eval()(ids)[0])
    model.train()
    assert (model(ids)[0] - model(ids)[0]).abs().max() > 1e-2
    torch.manual_seed(5)
    first = model(ids)[0]
    torch.manual_seed(5)
    same(first, model(ids)[0])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_attention_weights_are_dropped_in_training_only(dtype):
    """The function that drops them has no eval mode of its own: on both roads the layer must say 0 at evaluation (b2)."""
    layer = awake(Attention(tiny('gpt2', dropout=0.5))).to(dtype)
    x = torch.randn(2, 9, 32).to(dtype)
    same(layer(x), layer(x))
    layer.train()
    assert (layer(x) - layer(x)).abs().max() > 1e-2
    q, k, v = torch.randn(1, 1, 400, 4).to(dtype), torch.randn(1, 1, 50, 4).to(dtype), torch.ones(1, 1, 50, 4).to(dtype)
    y = attention(q.requires_grad_(), k, v, p=0.5).float()
    assert y.std() > 0.05 and abs(y.mean() - 1) < 0.05, f'what stays is not scaled up: mean {y.mean():.3f}'


def test_what_a_step_adds_to_the_stream_is_dropped_too():
    """Embedding and residual dropout: with all of it but a trace dropped, a block passes its input on, but for norms."""
    for norm_first in (True, False):
        block, x = awake(Block(tiny('gpt2', dropout=0.9999, norm_first=norm_first))).train(), torch.randn(8, 9, 32)
        wanted = x if norm_first else block.mlp_norm(block.attn_norm(x))
        passed = ((block(x, {}) - wanted).abs() < 1e-5).float().mean()
        assert passed > 0.6, f'norm_first={norm_first}: only {passed:.0%} of the stream is untouched'
    stack = awake(Stack(tiny('gpt2', dropout=0.5), nn.Embedding(V, 32), causal=True)).train()
    for embed in (stack.embed, awake(build(tiny('bert', dropout=0.5))).train().encoder.embed):  # BERT: after the norm
        dropped = (embed(some(8, T), torch.arange(T)[None]) == 0).float().mean()
        assert 0.4 < dropped < 0.6, f'{dropped:.0%} of the embedding is dropped'


def test_an_lstm_drops_what_enters_it_and_what_leaves_it():
    """And what passes between its layers; with one layer there is no between."""
    model, seen = awake(build(tiny('lstm', dropout=0.5, n_layer=1))).train(), {}
    model.lstm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    h = model.hidden(some(8, T))
    for name, x in (('input', seen['x']), ('output', h)):
        dropped = (x == 0).float().mean()
        assert 0.4 < dropped < 0.6, f'{dropped:.0%} of the {name} is dropped'
    assert (model.lstm.dropout, build(tiny('lstm', dropout=0.5)).lstm.dropout) == (0.0, 0.5)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), max_size=4), st.floats(0, 0.999), st.sampled_from([torch.float32, torch.bfloat16]),
       st.integers(0, 99))
@example([], 0.5, torch.float32, 0)
@example([3, 0, 2], 0.5, torch.float32, 0)
@example([7, 3], 1e-9, torch.float32, 0)
@example([7, 3], 0.9999, torch.bfloat16, 0)
def test_dropout_zeroes_values_and_scales_the_others(shape, p, dtype, seed):
    """Of any shape, in the order of dimensions they came in; the gradient goes where the values went; a seed decides."""
    x = (torch.rand(shape) + 0.5).to(dtype).transpose(0, -1 if shape else 0).requires_grad_()
    zeroed = max(1, min(255, round(256 * p))) if p else 0                              # of 256
    torch.manual_seed(seed)
    y = dropout(x, p)
    assert y.dtype == dtype and (zeroed or y is x), f'{y.dtype}, p={p}'
    kept = y != 0
    same(y, torch.where(kept, x * (256 / (256 - zeroed)), 0))
    y.sum().backward()
    same(x.grad, torch.full_like(x, 256 / (256 - zeroed)).where(kept, 0))
    assert zeroed or kept.all()
    torch.manual_seed(seed)
    same(dropout(x, p), y)


@pytest.mark.parametrize('p, zeroed', [(0.001, 1), (0.1, 26), (0.5, 128), (0.9, 230), (0.999, 255)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dropout_zeroes_its_share_at_each_of_eight_places_and_keeps_the_mean(p, zeroed, dtype):
    """One random number serves eight values: whatever their place in it, each goes with the same probability."""
    n, q = 20000, zeroed / 256
    gone = (dropout(torch.ones(n, 8, dtype=dtype), p) == 0).float()                    # (n, 8)
    sigma = math.sqrt(q * (1 - q) / n)
    off = (gone.mean(dim=0) - q).abs().max().item() / sigma
    assert off < 4.5, f'p={p}: {gone.mean(dim=0).tolist()} are zeroed, {off:.1f} sigma from {q:.4f}'
    mean = dropout(torch.full((8 * n,), 3.0), p).mean().item()
    assert abs(mean - 3) < 3 * 4.5 * sigma / (1 - q) / math.sqrt(8), f'p={p}: the mean of 3 is {mean}'


def test_dropout_zeroes_each_value_independently():
    """At p = 1/2 all 256 patterns of eight neighbours are as likely (chi squared, 255 degrees), and no two numbers agree."""
    n = 40000
    for _ in range(2):
        gone = (dropout(torch.ones(8 * n), 0.5) == 0).double()
        seen = torch.bincount((gone.view(n, 8) @ 2.0 ** torch.arange(8).double()).long(), minlength=256)
        chi = ((seen - n / 256).square() / (n / 256)).sum().item()
        assert 150 < chi < 375, f'chi squared of {chi:.0f}: 255 +- 23 is what independence gives'  # 5 sigma
        spread = 2 * gone - 1
        for lag in (1, 2, 7, 8, 16, 64, 1024):
            r = (spread[lag:] * spread[:-lag]).mean().item() * math.sqrt(8 * n - lag)
            assert abs(r) < 4.5, f'values {lag} apart are correlated: {r:.1f} sigma'
    for p in (0.05, 0.8):  # and where it is no single bit that decides
        gone = (dropout(torch.ones(n, 8), p) == 0).float()
        r = torch.corrcoef(gone.T).fill_diagonal_(0).abs().max().item() * math.sqrt(n)
        assert r < 4.5, f'p={p}: two of the eight places are correlated: {r:.1f} sigma'


def test_a_layer_of_dropout_is_off_at_evaluation():
    """And is torch's own to whoever looks for its kind, as when all dropout of a model is to be changed (b2)."""
    layer, x = Dropout(0.5), torch.ones(400)
    assert isinstance(layer, nn.Dropout) and layer.eval()(x) is x
    assert 100 < (layer.train()(x) == 0).sum() < 300 and not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize('dtype, p, S, gradients, plain', [
    (torch.float32, 0.3, 9, True, True), (torch.bfloat16, 0.3, 9, True, True), (torch.float32, 0.0, 9, True, False),
    (torch.float32, 0.3, 9, False, False), (torch.float32, 0.3, 513, True, False), (torch.bfloat16, 0.0, 9, True, True)])
def test_a_cpu_that_drops_weights_computes_the_formula(dtype, p, S, gradients, plain, monkeypatch):
    """The kernel with dropout is the slowest road on a CPU. Each weight is dropped by itself, the rest is scaled up."""
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda *args, **more: calls.append(1) or fused(*args, **more))
    q, k = torch.randn(2, 6, S, 4).to(dtype), torch.randn(2, 3, S, 4).to(dtype)
    v = torch.eye(S).expand(2, 3, S, S).to(dtype)                                      # so the answer is the weights
    with torch.set_grad_enabled(gradients):
        y = attention(q.requires_grad_(gradients), k, v, causal=True, p=p)
    assert bool(calls) != plain, f'{len(calls)} calls of the kernel'
    if plain:
        zeroed = round(256 * p)
        weights = attention_weights(q, k.repeat_interleave(2, dim=1), causal=True)
        close(y, torch.where(y != 0, weights * (256 / (256 - zeroed)), 0), 1e-6 if dtype == torch.float32 else 0.02)
        gone = (y == 0)[weights > 0].float().mean().item()                             # of 540
        assert abs(gone - p) <= 4.5 * math.sqrt(p * (1 - p) / 540), f'{gone:.0%} of the weights are dropped, not {p:.0%}'
        assert not p or not torch.equal(y[:, :3] == 0, y[:, 3:] == 0), 'two heads lose the same weights'


@every_preset
def test_bfloat16_autocast_gives_nearly_the_same_loss_and_finite_gradients(preset):
    """Mixed precision on the plain road, padded, with a row that is all padding."""
    model = awake(build(tiny(preset))).train()
    ids, keep = some(3, T), torch.arange(T) < torch.tensor([[T], [5], [0]])
    batch = {'ids': ids, 'keep': keep, 'targets': some(3, T).masked_fill(~keep, IGNORE)}
    if preset == 'bert':
        batch['next_targets'] = torch.tensor([0, 1, IGNORE])
    with torch.no_grad():
        exact = model(**batch)[1].item()
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(**batch)[1]
    loss.backward()
    assert abs(loss.item() / exact - 1) < 0.05 and loss.dtype == torch.float32, (loss, exact)
    assert all(p.grad.isfinite().all() for p in model.parameters())

# -----------------------------------------------------------------------------
# Files


@every_preset
def test_a_model_comes_back_from_its_file_as_it_was(preset, tmp_path):
    """Configuration, weights, logits, tying, and what else was stored; any name of a file, any text."""
    model, path = awake(build(tiny(preset, dropout=0.1))), tmp_path / '模型 🙂 e\u0301.pt'
    save(path, model, task='', labels=['猫', '🙂', 'e\u0301'], step=7)
    again, checkpoint = load(path)
    assert type(again) is type(model) and again.config == model.config
    for name, p in model.state_dict().items():
        same(p, again.state_dict()[name])
    ids = some(2, 9)
    same(model(ids)[0], again.eval()(ids)[0])
    assert (again.output.weight is again.tokens.weight) == model.config.tied
    assert (checkpoint['labels'], checkpoint['step'], checkpoint['config']) == \
        (['猫', '🙂', 'e\u0301'], 7, dataclasses.asdict(model.config))
    assert os.listdir(tmp_path) == [path.name]


@every_preset
def test_dropout_and_a_shorter_block_size_may_change_at_loading(preset, tmp_path):
    """Cropped and then run (b10): the near positions are those of before, the far ones are gone."""
    model, ids = awake(build(tiny(preset))), some(2, 7)
    save(tmp_path / 'ckpt.pt', model)
    again, _ = load(str(tmp_path / 'ckpt.pt'), block_size=7, dropout=0.25)
    assert (again.config.block_size, again.config.dropout) == (7, 0.25)
    close(again.eval()(ids)[0], model(ids)[0], 1e-5)
    assert (again.train()(ids)[0] - again(ids)[0]).abs().max() > 1e-3, 'the new dropout does nothing'
    if preset != 'lstm':
        with pytest.raises(ValueError, match='block_size=7'):
            again(some(1, 8))
    with pytest.raises(ValueError) as error:
        load(tmp_path / 'ckpt.pt', block_size=T + 1)
    assert f'block_size={T + 1}' in one_line(error) and f'{T} that' in one_line(error), error.value
    with pytest.raises(ValueError, match='dropout=2'):
        load(tmp_path / 'ckpt.pt', dropout=2.0)


def test_a_folder_means_its_best_checkpoint_else_its_latest(tmp_path):
    """best.pt before ckpt.pt; nothing there is a FileNotFoundError that says how to train one."""
    for path in (tmp_path, tmp_path / 'ckpt.pt', tmp_path / 'nowhere'):
        with pytest.raises(FileNotFoundError) as error:
            load(path)
        assert str(path) in one_line(error) and 'train.py' in one_line(error), error.value
    save(tmp_path / 'ckpt.pt', build(tiny('gpt2')), step=2)
    assert load(tmp_path)[1]['step'] == 2
    save(tmp_path / 'best.pt', build(tiny('llama')), step=1)
    assert load(tmp_path)[1]['step'] == 1


@pytest.mark.parametrize('fault', [ValueError('half way'), KeyboardInterrupt(), OSError(28, 'No space left on device')])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(fault, tmp_path, monkeypatch):
    """Whatever ends it, while writing or at the last step, even Ctrl-C: the old checkpoint is whole, no litter stays."""
    path = tmp_path / 'ckpt.pt'
    save(path, build(tiny('gpt2')), step=1)
    old = path.read_bytes()

    def half(f):
        f.write(b'half a file')
        raise fault

    def broken(*args):
        raise fault

    with pytest.raises(type(fault)):
        write_file(path, half)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save(path, build(tiny('gpt2')), bad=lambda: 0)  # cannot be stored: found out in the middle
    for name in ('fsync', 'replace'):
        with monkeypatch.context() as patch, pytest.raises(type(fault)):
            patch.setattr(os, name, broken)
            save(path, build(tiny('gpt2')), step=2)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ['ckpt.pt'], os.listdir(tmp_path)


def test_the_temporary_file_is_whole_and_beside_its_target_before_it_takes_its_place(tmp_path, monkeypatch):
    """A rename is one step only on one file system, and only worth it once the bytes are on the disk."""
    done, size, fsync, replace = [], [], os.fsync, os.replace

    def flushed(number):
        done.append('fsync')
        size.append(os.fstat(number).st_size)  # what still waits in a buffer would miss the disk
        fsync(number)

    def watch(source, target):
        assert os.path.dirname(source) == os.path.dirname(target) == str(tmp_path)
        assert torch.load(source, weights_only=True)['step'] == 1
        done.append('replace')
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', flushed)
    write_file(tmp_path / 'small', lambda f: f.write('小'.encode()))
    monkeypatch.setattr(os, 'replace', watch)
    save(str(tmp_path / 'ckpt.pt'), build(tiny('gpt2')), step=1)
    assert done == ['fsync', 'fsync', 'replace'] and size == [3, os.path.getsize(tmp_path / 'ckpt.pt')], (done, size)


@given(st.floats(0, 1, exclude_max=True))
@example(0.0)
@example(0.999)
def test_a_file_cut_short_is_refused(tmp_path, part):
    """At whatever byte: one line that names the file, a ValueError."""
    path = tmp_path / 'ckpt.pt'
    save(path, build(tiny('gpt2', n_layer=1, n_embd=8)), labels=['é'])
    whole = path.read_bytes()
    path.write_bytes(whole[:int(part * len(whole))])
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(path) in one_line(error), error.value


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@settings(max_examples=200)
@given(st.binary(max_size=60) | st.binary(max_size=30).map(lambda tail: b'\x80\x02' + tail) | st.text().map(str.encode))
@example('a poem about 小猫 🙂'.encode())
@example(b'GPT')
@example('e\u0301'.encode())
def test_a_file_of_something_else_is_refused(tmp_path, content):
    """Random bytes, broken pickles, plain text (of which the first letter may mean something to pickle)."""
    path = tmp_path / 'ckpt.pt'
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(path) in one_line(error), error.value


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('write', [torch.save, lambda evil, f: f.write(pickle.dumps(evil)),
                                   lambda evil, f: torch.save(evil, f, _use_new_zipfile_serialization=False)])
def test_opening_a_file_never_runs_code(write, tmp_path):
    """A pickle may call any function when it is read; ours must not be read that way."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)

    with open(tmp_path / 'ckpt.pt', 'wb') as f:
        write({'config': dataclasses.asdict(tiny('gpt2')), 'model': {}, 'labels': Evil()}, f)
    with pytest.raises(ValueError) as error:
        load(tmp_path / 'ckpt.pt')
    assert one_line(error) and os.listdir(tmp_path) == ['ckpt.pt'], 'the code in the file was run'


@pytest.mark.parametrize('damage, words', [
    (lambda c: [1, 2, 3], 'config'), (lambda c: {'a': 1}, 'config'), (lambda c: c['model'], 'config'),
    (lambda c: {**c, 'config': 'gpt2'}, 'config'), (lambda c: {**c, 'model': list(c['model'])}, 'model'),
    (lambda c: c['model'].pop('tokens.weight') is None or c, 'tokens.weight missing'),
    (lambda c: c['model'].pop('decoder.embed.positions.weight') is None or c, 'positions.weight missing'),
    (lambda c: {**c, 'model': {**c['model'], 'tokens.weight': torch.zeros(V + 1, 32)}}, 'tokens.weight (51, (50,'),
    (lambda c: {**c, 'model': {**c['model'], 'decoder.embed.positions.weight': torch.zeros(5, 32)}}, 'positions (5,'),
    (lambda c: {**c, 'model': {**c['model'], 'decoder.embed.positions.weight': torch.zeros(20, 32)}}, 'positions (20,'),
    (lambda c: {**c, 'model': {**c['model'], 'decoder.embed.positions.weight': torch.zeros(())}}, 'positions'),
    (lambda c: {**c, 'model': {**c['model'], 'decoder.norm.weight': torch.zeros(())}}, 'decoder.norm.weight'),
    (lambda c: {**c, 'model': {**c['model'], 'tokens.weight': [[0.0] * 32] * V}}, 'tokens.weight'),
    (lambda c: {**c, 'model': {**c['model'], '多余.weight': torch.zeros(2)}}, '多余.weight'),
    (lambda c: {**c, 'model': {**c['model'], 'more': torch.zeros(2), 7: torch.zeros(2)}}, 'part'),
    (lambda c: {**c, 'config': {**c['config'], 'n_layer': 3}}, 'blocks.2'),
    (lambda c: {**c, 'config': {**c['config'], 'n_layer': 1}}, 'blocks.1'),
    (lambda c: {**c, 'config': {**c['config'], 'n_layer': 'two'}}, "n_layer='two'"),
    (lambda c: {**c, 'config': {**c['config'], 'arch': 'rwkv'}}, 'arch=rwkv'),
    (lambda c: {**c, 'config': {**c['config'], 'flux': 1}}, 'flux'),
    (lambda c: {**c, 'config': {**c['config'], 5: 1}}, 'configuration'),
    (lambda c: {**c, 'config': {**c['config'], 'two\nlines': 1}}, 'lines')])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(damage, words, tmp_path):
    """Foreign dicts, missing, misshapen and extra weights, unknown fields: a ValueError that names what is wrong."""
    path = tmp_path / 'ckpt.pt'
    save(path, build(tiny('gpt2')))
    torch.save(damage(torch.load(path, weights_only=True)), path)
    with pytest.raises(ValueError) as error:
        load(path)
    assert all(word in one_line(error) for word in words.split()), f'{error.value} does not name {words}'

# -----------------------------------------------------------------------------
# BERT: everything sees everything, and it is asked for hidden tokens and for whether B follows A


def halves(B, length):
    """Segments (B, length): 0 in the first half of a row, 1 in the second."""
    return (torch.arange(length) >= length // 2).long().expand(B, -1)


def beside(side, a, b):
    """a (B, T, ...) with b on its side: the padding of a row."""
    return torch.cat([b, a] if side == 'left' else [a, b], dim=1)


def embedded(model, ids, segments):
    """What enters the first block of BERT, by hand: the sum of three embeddings, normalised."""
    embed = model.encoder.embed
    x = model.tokens.weight[ids] + embed.positions.weight[:ids.size(1)] + embed.segments.weight[segments]
    return F.layer_norm(x, (x.size(-1),), embed.norm.weight, embed.norm.bias, 1e-12)


def of_both_classes(model, **batch):
    """The probabilities that B does not follow A, and that it does, as the two losses tell them: (2, B)."""
    return torch.stack([torch.stack([(-model(**{key: t[i:i + 1] for key, t in batch.items()},
                                             next_targets=torch.tensor([k]))[1]).exp() for i in range(len(batch['ids']))])
                        for k in (0, 1)])


@pytest.mark.parametrize('kind, arguments', [
    (GPT, 'keep targets counts'), (LSTM, 'keep targets counts'), (BERT, 'segments keep targets next_targets counts'),
    (EncoderDecoder, 'keep decoder_ids targets counts'), (TaskModel, 'segments keep targets counts')])
def test_forward_takes_the_arguments_of_the_contract(kind, arguments):
    """Examples are dicts of these names, so a name is an interface; all but ids may be left out."""
    parameters = list(inspect.signature(kind.forward).parameters.values())
    assert [p.name for p in parameters] == ['self', 'ids', *arguments.split()]
    assert all(p.default is None for p in parameters[2:]), parameters
    assert list(inspect.signature(kind.hidden).parameters)[:3] == ['self', 'ids', 'keep']


@given(st.integers(1, 3), st.integers(1, T), st.integers(0, 99))
def test_bert_gives_all_logits_or_those_of_the_asked_tokens(B, length, seed):
    """(B, T, V) and no loss; with targets (N, V), in reading order; next_targets alone leave all logits."""
    model = awake(build(tiny('bert')))
    torch.manual_seed(seed)
    ids, targets = some(B, length), some(B, length)
    asked = torch.rand(B, length) < 0.3
    full, loss = model(ids)
    assert full.shape == (B, length, V) and loss is None and model.hidden(ids).shape == (B, length, 32)
    logits, loss = model(ids, targets=targets.masked_fill(~asked, IGNORE))
    assert logits.shape == (asked.sum(), V) and loss.shape == ()
    close(logits, full[asked], 1e-4)
    logits, loss = model(ids, next_targets=torch.ones(B, dtype=torch.long))
    close(logits, full, 0.0)
    assert loss.shape == () and loss > 0


@given(st.integers(1, T), st.integers(0, 99))
def test_bert_equals_torchs_own_encoder_behind_its_embedding(length, seed):
    """Post-norm, exact GELU, eps 1e-12 and no last norm (b5, b16), padded on the right; then the MLM head by hand."""
    model = awake(build(tiny('bert', mlp_dim=48)))
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, 'gelu', layer_norm_eps=1e-12, batch_first=True, norm_first=False)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    awake(theirs).train()  # in eval mode it takes a fused road that writes zeros under padding
    for its, block in zip(theirs.layers, model.encoder.blocks, strict=True):
        copy_torch_layer(its, block, cross=False)
    torch.manual_seed(seed)
    ids, segments = some(2, length), halves(2, length)
    keep = torch.arange(length) < torch.tensor([[length], [length // 2 + 1]])
    x = embedded(model, ids, segments)
    close(model.encoder.embed(ids, torch.arange(length)[None], segments), x, 1e-5)
    h = theirs(x, src_key_padding_mask=~keep)[keep]                                    # (real tokens, C)
    close(model.hidden(ids, keep, segments)[keep], h, 1e-4)
    dense, norm = model.transform, model.transform_norm
    transformed = norm(model.act(dense(h)))  # compared closely: the two GELUs are only 5e-4 apart
    h = F.layer_norm(F.gelu(h @ dense.weight.T + dense.bias), (32,), norm.weight, norm.bias, 1e-12)
    close(transformed, h, 1e-5)
    close(model(ids, segments, keep)[0][keep], h @ model.tokens.weight.T + model.output.bias, 1e-3)


@given(st.integers(1, 9), st.integers(0, 3), st.sampled_from(['left', 'right']), st.data())
def test_in_bert_every_real_token_changes_every_output(length, pads, side, data):
    """The opposite of a decoder: change one token and all positions feel it, before and behind (b3)."""
    model, j = awake(build(tiny('bert'))), data.draw(st.integers(0, length - 1))
    ids, padding = some(2, length), some(2, pads)
    changed = ids.clone()
    changed[:, j] = (ids[:, j] + 1) % V
    keep = beside(side, torch.ones(2, length, dtype=torch.bool), torch.zeros(2, pads, dtype=torch.bool))
    before, after = (model(beside(side, t, padding), keep=keep)[0][keep] for t in (ids, changed))
    moved = (before - after).abs().amax(dim=1)                                         # (real tokens)
    assert (moved > 0).all(), f'token {j} of {length} changes only {(moved > 0).view(2, -1).tolist()}'


@given(st.integers(1, 9), st.integers(0, 7), st.sampled_from(['left', 'right']), st.integers(0, 99))
def test_padding_is_invisible_to_what_bert_says_of_tokens(length, pads, side, seed):
    """Any amount on either side, any ids and segments in it: the hidden tokens are guessed as alone (b3, b10)."""
    model = awake(build(tiny('bert')))
    torch.manual_seed(seed)
    ids, segments, padding = some(2, length), halves(2, length), some(2, pads)
    keep = beside(side, torch.ones(2, length, dtype=torch.bool), torch.zeros(2, pads, dtype=torch.bool))
    logits = model(beside(side, ids, padding), beside(side, segments, padding % 2), keep)[0]
    close(logits[keep].view(2, length, V), model(ids, segments)[0], 1e-4)
    other = model(beside(side, ids, some(2, pads)), beside(side, segments, some(2, pads) % 2), keep)[0]
    same(logits[keep], other[keep])


@pytest.mark.parametrize('side', ['right', 'left'])
@given(st.integers(1, 9), st.integers(0, 7), st.integers(0, 99))
def test_padding_is_invisible_to_whether_b_follows_a(side, length, pads, seed):
    """[CLS] is the first real token, on whichever side the padding lies, and whatever ids are in it (b3, b10)."""
    model = awake(build(tiny('bert')))
    torch.manual_seed(seed)
    ids, segments, padding = some(2, length), halves(2, length), some(2, pads)
    keep = beside(side, torch.ones(2, length, dtype=torch.bool), torch.zeros(2, pads, dtype=torch.bool))
    alone = of_both_classes(model, ids=ids, segments=segments)
    padded = of_both_classes(model, ids=beside(side, ids, padding), segments=beside(side, segments, padding % 2), keep=keep)
    close(alone.sum(dim=0), torch.ones(2))
    close(padded, alone, 1e-4)


def test_segments_matter_and_none_means_the_first_text():
    """To the guesses and to the answer about all; without a row for segments there is nothing to tell."""
    model, ids, segments = awake(build(tiny('bert'))), some(2, 9), halves(2, 9)
    zeros, targets = torch.zeros_like(ids), torch.tensor([0, 1])
    same(model(ids)[0], model(ids, zeros)[0])
    same(model.hidden(ids), model.hidden(ids, segments=zeros))
    same(model(ids, next_targets=targets)[1], model(ids, zeros, next_targets=targets)[1])
    difference = (model(ids)[0] - model(ids, segments)[0]).abs().amax(dim=(0, 2))
    assert (difference > 1e-3).all(), f'segments of others do not matter at every position: {difference}'
    assert (model(ids, next_targets=targets)[1] - model(ids, segments, next_targets=targets)[1]).abs() > 1e-3
    without = awake(build(tiny('bert', segments=0)))
    same(without(ids)[0], without(ids, segments)[0])


@given(st.integers(1, 4), st.integers(1, T), st.booleans(), st.integers(0, 99))
def test_the_loss_of_bert_is_the_sum_of_two(B, length, counted, seed):
    """MLM over the asked tokens plus NSP over the asked rows, each divided by its own count (b1); either may be alone."""
    model = awake(build(tiny('bert')))
    torch.manual_seed(seed)
    batch = {'ids': some(B, length), 'segments': halves(B, length)}
    targets, next_targets = some(B, length), torch.randint(2, (B,))
    targets[torch.rand(B, length) < 0.5] = IGNORE
    targets[0, 0], next_targets[1:] = 7, next_targets[1:].masked_fill(torch.rand(B - 1) < 0.3, IGNORE)
    counts = {'targets': 100, 'next_targets': 7} if counted else None
    x, logits = model.hidden(batch['ids'], segments=batch['segments']), model(**batch)[0]
    dense, last = model.pooler[0], model.is_next
    follows = (x[:, 0] @ dense.weight.T + dense.bias).tanh() @ last.weight.T + last.bias  # (B, 2)
    mlm, nsp = (F.cross_entropy(flat, t, reduction='sum') / (counts[key] if counted else (t != IGNORE).sum())
                for key, flat, t in (('targets', logits.flatten(0, 1), targets.flatten()),
                                     ('next_targets', follows, next_targets)))
    close(model(**batch, targets=targets, counts=counts)[1], mlm, 1e-4)
    close(model(**batch, next_targets=next_targets, counts=counts)[1], nsp, 1e-4)
    close(model(**batch, targets=targets, next_targets=next_targets, counts=counts)[1], mlm + nsp, 1e-4)


@pytest.mark.parametrize('label', [0, 1])
def test_both_answers_to_whether_b_follows_a_are_learned_from(label):
    """Neither class is taken for "not asked": each sends a gradient through the pooler into the tokens (b8)."""
    model = awake(build(tiny('bert')))
    ids = some(3, 8)
    loss = model(ids, next_targets=torch.full((3,), label))[1]
    loss.backward()
    assert loss > 1e-4, f'label {label} costs {loss}'
    for name in ('is_next.weight', 'is_next.bias', 'pooler.0.weight', 'tokens.weight', 'encoder.embed.segments.weight'):
        assert model.get_parameter(name).grad.any(), f'label {label} sends no gradient to {name}'
    assert model.is_next.bias.grad[label] < 0 < model.is_next.bias.grad[1 - label], model.is_next.bias.grad
    assert model.output.bias.grad is None, 'NSP has nothing to do with the vocabulary'


def test_class_one_means_that_b_follows():
    """In Google's files it is 0. A model sure of class 1 pays nothing for target 1, and much for 0 (b8)."""
    model = awake(build(tiny('bert')))
    with torch.no_grad():
        model.is_next.weight.zero_()
        model.is_next.bias.copy_(torch.tensor([-10.0, 10.0]))
    losses = [model(some(2, 5), next_targets=torch.full((2,), label))[1].item() for label in (0, 1)]
    assert losses[0] > 19 and losses[1] < 1e-6, losses
    follows = model.follows(model.hidden(some(2, 5)))
    assert follows.shape == (2, 2) and (follows.argmax(dim=1) == 1).all()


@pytest.mark.parametrize('with_next', [False, True])
def test_a_batch_of_bert_that_asks_for_no_token_is_no_nan(with_next):
    """No token asked: no rows of logits, a loss of 0 (or that of NSP alone), and only finite gradients (b7)."""
    model, ids, nothing = awake(build(tiny('bert'))), some(2, 8), torch.full((2, 8), IGNORE)
    next_targets = torch.tensor([0, 1]) if with_next else None
    logits, loss = model(ids, targets=nothing, next_targets=next_targets)
    loss.backward()
    assert logits.shape == (0, V) and loss.isfinite(), (logits.shape, loss)
    close(loss, model(ids, next_targets=next_targets)[1] if with_next else torch.tensor(0.0), 1e-6)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    _, loss = model(ids, targets=nothing, next_targets=torch.full((2,), IGNORE))
    assert loss.item() == 0.0, loss


def test_a_row_of_padding_poisons_nothing_in_bert():
    """All padding, with a target on neither: all outputs and gradients finite, the other rows as alone (b3)."""
    model = awake(build(tiny('bert'))).train()
    ids, targets, keep = some(3, 8), some(3, 8), torch.arange(8) < torch.tensor([[0], [5], [8]])
    batch = {'ids': ids, 'segments': halves(3, 8), 'keep': keep, 'targets': targets.masked_fill(~keep, IGNORE),
             'next_targets': torch.tensor([IGNORE, 0, 1])}
    _, loss = model(**batch)
    close(loss, model(**{key: t[1:] for key, t in batch.items()})[1], 1e-5)
    model(**{**batch, 'next_targets': torch.tensor([1, 0, 1])})[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), f'{name} has no gradient, or none to use'
    assert model(ids, keep=keep)[0].isfinite().all()


def test_new_weights_of_bert_are_small_and_of_one_size():
    """0.02 in every matrix and table, heads and segments too; biases 0, norms 1."""
    for name, p in build(tiny('bert', n_embd=64, n_layer=4, vocab_size=500, segments=40)).named_parameters():
        if p.dim() < 2:
            same(p.data, torch.zeros_like(p) if name.endswith('bias') else torch.ones_like(p))
        else:
            tolerance = 4 * 0.02 / math.sqrt(2 * p.numel())  # four times what chance does to a measured deviation
            assert abs(p.std().item() - 0.02) < tolerance, f'{name}: {p.std():.4f}'


def test_guesses_of_bert_have_a_bias_and_share_the_embedding():
    """A token that is frequent may be likely whatever the text; the matrix is the embedding, in one piece (b5)."""
    model, ids = build(tiny('bert')), some(2, 5)
    before = model(ids)[0]
    with torch.no_grad():
        model.output.bias[7] += 3.0
    close(model(ids)[0] - before, 3.0 * F.one_hot(torch.tensor(7), V).expand(2, 5, V), 1e-5)
    assert model.output.weight.data_ptr() == model.tokens.weight.data_ptr()
    assert model.encoder.embed.tokens.weight.data_ptr() == model.tokens.weight.data_ptr()
    assert [name for name, p in model.named_parameters() if p.shape == (V, 32)] == ['tokens.weight']


@pytest.mark.parametrize('activation', ['relu', 'gelu', 'gelu_tanh', 'relu2'])
@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
def test_guesses_of_bert_bend_and_normalise_as_its_blocks_do(activation, norm):
    """act(x W + b), then the norm of the configuration, then the embedding and a bias: written out."""
    model, x = awake(build(tiny('bert', activation=activation, norm=norm, norm_eps=1e-3))), torch.randn(5, 32)
    w = model.state_dict()
    h = x @ w['transform.weight'].T + w['transform.bias']
    h = {'relu': h.clamp(min=0), 'relu2': h.clamp(min=0) ** 2, 'gelu': h * (1 + torch.erf(h / math.sqrt(2))) / 2,
         'gelu_tanh': h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3))) / 2}[activation]
    if norm == 'layernorm':
        h = h - h.mean(dim=1, keepdim=True)
    h = h / (h.square().mean(dim=1, keepdim=True) + 1e-3).sqrt() * w['transform_norm.weight']
    h = h + (w['transform_norm.bias'] if norm == 'layernorm' else 0)
    close(model.fill(x), h @ w['tokens.weight'].T + w['output.bias'], 1e-4)

# -----------------------------------------------------------------------------
# Tasks: any trunk and one Linear

TRUNKS = ('bert', 'gpt2', 'palm', 'llama', 'nano', 'lstm')
every_task = pytest.mark.parametrize('task', TASKS)
every_trunk = pytest.mark.parametrize('preset', TRUNKS)
L = 3  # labels of the tiny tasks


def asking(task, preset, **changes):
    """A tiny model with a head. A question about an answer's place needs no labels."""
    return build(tiny(preset, task=task, n_labels=0 if task == 'qa' else L, **changes))


def answers(task, keep):
    """Random targets for real tokens keep (B, T): classify (B,), tag (B, T), qa (B, 2)."""
    B, length = keep.shape
    if task == 'classify':
        return torch.randint(L, (B,))
    if task == 'tag':
        return torch.randint(L, (B, length)).masked_fill(~keep, IGNORE)
    return (torch.rand(B, 2, length) * keep[:, None]).argmax(dim=2)


@every_task
@every_trunk
def test_a_task_gives_logits_of_its_shape_and_the_loss_worked_by_hand(task, preset):
    """(B, L), (B, T, L), (B, 2, T): -log softmax at the targets, over the number asked or the one given (b1)."""
    model, ids = awake(asking(task, preset)), some(3, 7)
    targets = answers(task, torch.ones(3, 7, dtype=torch.bool))
    targets[0] = IGNORE  # a whole row is not asked
    logits, loss = model(ids, targets=targets)
    assert logits.shape == {'classify': (3, L), 'tag': (3, 7, L), 'qa': (3, 2, 7)}[task] and model(ids)[1] is None
    close(logits, model(ids)[0], 0.0)
    nats = -logits.log_softmax(dim=-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    total, asked = nats[1:].sum(), targets[1:].numel()
    close(loss, total / asked, 1e-5)
    close(model(ids, targets=targets, counts={'targets': 40})[1], total / 40, 1e-5)
    moved = logits.movedim(-1, 1) if task != 'classify' else logits  # where F.cross_entropy wants the classes
    close(loss, F.cross_entropy(moved, targets), 1e-5)
    close(model(ids, targets=torch.full_like(targets, IGNORE))[1], torch.tensor(0.0), 0.0)


@every_trunk
@pytest.mark.parametrize('side', ['right', 'left'])
@given(st.lists(st.integers(1, 8), min_size=2, max_size=4), st.integers(0, 3))
def test_a_text_is_classified_by_its_last_real_token_and_by_cls_in_bert(side, preset, lengths, more):
    """A decoder's first token saw nothing, its last one all; on either side padding changes nothing (b3, b10)."""
    model, total = awake(asking('classify', preset)), max(lengths) + more
    n = torch.tensor(lengths)[:, None]
    keep = torch.arange(total) < n if side == 'right' else torch.arange(total) >= total - n
    ids = some(len(lengths), total)
    logits = model(ids, keep=keep)[0]
    close(model(torch.where(keep, ids, some(*ids.shape)), keep=keep)[0], logits, 1e-5)
    for i, length in enumerate(lengths):
        row = ids[i:i + 1, keep[i]]
        h = model.hidden(row)
        read = model.trunk.pooler(h[:, 0]) if preset == 'bert' else h[:, length - 1]
        close(logits[i:i + 1], read @ model.head.weight.T + model.head.bias, 1e-4)
        close(logits[i:i + 1], model(row)[0], 1e-4)


@every_trunk
@given(st.integers(1, 9), st.integers(0, 6), st.sampled_from(['left', 'right']), st.integers(0, 99))
def test_tags_and_spans_are_read_at_every_token_and_padding_changes_nothing(preset, length, pads, side, seed):
    """One Linear on each hidden state; qa has its two rows side by side as (B, 2, T), first where answers begin (b3)."""
    torch.manual_seed(seed)
    ids, real, padding = some(2, length), torch.ones(2, length, dtype=torch.bool), torch.zeros(2, pads, dtype=torch.bool)
    keep, padded, other = beside(side, real, padding), beside(side, ids, some(2, pads)), beside(side, ids, some(2, pads))
    for task in ('tag', 'qa'):
        model = awake(asking(task, preset))
        by_hand = model.hidden(ids) @ model.head.weight.T + model.head.bias             # (B, T, L or 2)
        logits, changed, alone = model(padded, keep=keep)[0], model(other, keep=keep)[0], model(ids)[0]
        if task == 'qa':
            logits, changed, alone = (t.transpose(1, 2) for t in (logits, changed, alone))
        close(alone, by_hand, 1e-4)
        close(logits[keep].view_as(alone), alone, 1e-4)
        same(logits[keep], changed[keep])


@every_trunk
@given(st.lists(st.integers(1, 8), min_size=2, max_size=3), st.sampled_from(['left', 'right', 'holes']), st.booleans())
def test_an_answer_never_begins_or_ends_in_the_padding(preset, lengths, side, half):
    """Probability exactly 0 there and 1 over the real tokens, in bfloat16 too, however large the logits."""
    model = awake(asking('qa', preset))
    with torch.no_grad():
        model.head.weight.mul_(100)
    n = torch.tensor(lengths)[:, None]
    keep = {'left': torch.arange(10) >= 10 - n, 'right': torch.arange(10) < n, 'holes': torch.rand(len(n), 10) < 0.5}[side]
    keep[:, 5] |= ~keep.any(dim=1)
    with torch.autocast('cpu', torch.bfloat16, enabled=half):
        logits, loss = model(some(len(n), 10), keep=keep, targets=answers('qa', keep))
    p = logits.float().softmax(dim=-1)                                                 # (B, 2, T)
    assert p.masked_select(~keep[:, None]).count_nonzero() == 0, p
    close(p.sum(dim=-1), torch.ones(len(n), 2))
    assert logits.isfinite().all() and loss.isfinite(), loss


@every_task
@every_trunk
def test_a_row_of_padding_poisons_no_task(task, preset):
    """All padding in one row, right and left in others: loss and gradients finite, the loss that of the other rows (b3)."""
    model = awake(asking(task, preset)).train()
    keep = torch.stack([torch.zeros(8, dtype=torch.bool), torch.arange(8) < 5, torch.arange(8) >= 5])
    ids, targets = some(3, 8), answers(task, keep)
    targets[0] = IGNORE
    logits, loss = model(ids, keep=keep, targets=targets)
    loss.backward()
    assert logits.isfinite().all() and loss.isfinite()
    close(loss, model(ids[1:], keep=keep[1:], targets=targets[1:])[1], 1e-5)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.head.weight.grad.any() and model.trunk.tokens.weight.grad.any(), 'the trunk learns nothing'


@every_task
@every_trunk
def test_every_trunk_learns_every_task(task, preset):
    """A batch of four padded texts by heart, in a few dozen steps from random weights, through the optimizer's groups."""
    model = asking(task, preset, n_layer=1, n_embd=16, n_head=2, n_kv_head=0, mlp_dim=32)
    ids, keep = torch.randperm(V)[:32].view(4, 8), torch.arange(8) < torch.tensor([[8], [6], [8], [3]])
    targets = answers(task, keep)
    optimizer = torch.optim.AdamW(optimizer_groups(model, 0.0), lr=0.02)
    for _ in range(60):
        loss = model(ids, segments=halves(4, 8), keep=keep, targets=targets)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits, loss = model(ids, segments=halves(4, 8), keep=keep, targets=targets)
    right = (logits.argmax(dim=-1) == targets)[targets != IGNORE]
    assert right.all() and loss < 0.1, f'{right.sum()} of {right.numel()} right, loss {loss:.3f}'


@every_trunk
def test_a_task_tells_its_trunk_of_segments_where_there_are_any(preset):
    """BERT answers differently where the second text begins; a decoder knows no segments and does not mind them."""
    ids, segments = some(2, 9), halves(2, 9)
    for task in TASKS:
        model = awake(asking(task, preset))
        difference = (model(ids, segments)[0] - model(ids)[0]).abs().max().item()
        assert (difference > 1e-3) == (preset == 'bert'), f'{task}: segments change logits by {difference:.1e}'
        same(model(ids, torch.zeros_like(ids))[0], model(ids)[0])


@pytest.mark.parametrize('preset', ['gpt2', 'lstm'])
def test_segments_are_refused_where_no_model_reads_them(preset):
    """--segments 2 with a decoder: an error at once, or they matter; no crash at the first batch, nothing in silence."""
    try:
        model = awake(asking('classify', preset, segments=2))
    except ValueError as e:
        assert 'segments=2' in str(e), e
        return
    ids = some(2, 9)
    assert (model(ids, segments=halves(2, 9))[0] - model(ids)[0]).abs().max() > 1e-3


@every_task
@every_trunk
def test_a_trunk_is_the_model_without_its_task(task, preset):
    """Pre-trained weights fit name by name; what is new is one Linear, which starts small."""
    model, plain = asking(task, preset), awake(build(tiny(preset)))
    assert type(model) is TaskModel and type(model.trunk) is type(plain) and model.trunk.config == plain.config
    assert model.config.task == task and plain.config.task == '' and plain.config.n_labels == 0
    expected = {name: p.shape for name, p in plain.state_dict().items()}
    assert {name: p.shape for name, p in model.trunk.state_dict().items()} == expected
    assert set(model.state_dict()) == {f'trunk.{name}' for name in expected} | {'head.weight', 'head.bias'}
    assert model.head.weight.shape == (2 if task == 'qa' else L, 32)
    model.trunk.load_state_dict(plain.state_dict())
    ids, keep = some(2, 9), torch.arange(9) < torch.tensor([[9], [4]])
    same(model.eval().hidden(ids, keep), plain.hidden(ids, keep))


@every_trunk
def test_a_new_head_knows_nothing_yet(preset):
    """Standard deviation 0.02, no bias, and a trunk that is initialised like any other of its row."""
    torch.manual_seed(0)
    model = build(tiny(preset, task='tag', n_labels=400))
    std = model.head.weight.std().item()
    assert 0.019 < std < 0.021 and model.head.bias.count_nonzero() == 0, std
    torch.manual_seed(0)
    for name, p in build(tiny(preset)).state_dict().items():
        same(model.trunk.state_dict()[name], p)


def test_what_the_head_reads_is_dropped_in_training_only():
    """Over the dropout of the trunk: with the trunk at rest, half of what the head reads is 0, and none at evaluation."""
    for task in TASKS:
        model, seen, ids = awake(asking(task, 'bert', dropout=0.5)), {}, some(16, 9)
        model.head.register_forward_pre_hook(lambda module, args, seen=seen: seen.update(x=args[0]))
        same(model(ids)[0], model(ids)[0])
        model.drop.train()
        model(ids)
        dropped = (seen['x'] == 0).float().mean()
        assert 0.4 < dropped < 0.6, f'{task}: {dropped:.0%} of what the head reads is dropped'


@every_task
@every_trunk
def test_a_task_comes_back_from_its_file_as_it_was(task, preset, tmp_path):
    """Task, labels in any script, trunk and head; a shorter block_size forgets far positions here too (b10)."""
    model, path, ids = awake(asking(task, preset)), tmp_path / '标签 🙂 e\u0301.pt', some(2, 7)
    save(path, model, task=task, labels=['猫', '🙂', 'e\u0301'])
    again, checkpoint = load(path)
    assert type(again) is TaskModel and again.config == model.config and checkpoint['labels'] == ['猫', '🙂', 'e\u0301']
    assert set(again.state_dict()) == set(model.state_dict())
    for name, p in model.state_dict().items():
        same(p, again.state_dict()[name])
    same(model(ids)[0], again.eval()(ids)[0])
    shorter, _ = load(path, block_size=7)
    assert shorter.config.block_size == shorter.trunk.config.block_size == 7
    close(shorter.eval()(ids)[0], model(ids)[0], 1e-5)
    if preset != 'lstm':
        with pytest.raises(ValueError, match='block_size=7'):
            shorter(some(1, 8))


@every_task
@every_trunk
def test_optimizer_groups_of_a_task_put_its_head_beside_the_tables(task, preset):
    """Each weight once (b5). A head has one row a label, so Muon must not turn it; pooler and MLM transform are matrices."""
    model = asking(task, preset)
    groups = {group['name']: group['params'] for group in optimizer_groups(model, 0.1)}
    group_of = {id(p): name for name, params in groups.items() for p in params}
    assert sum(map(len, groups.values())) == len(group_of) == len(list(model.parameters()))
    trunk = {id(p): group['name'] for group in optimizer_groups(model.trunk, 0.1) for p in group['params']}
    assert {key: group_of[key] for key in trunk} == trunk, 'a weight of the trunk has changed its group'
    assert (group_of[id(model.head.weight)], group_of[id(model.head.bias)]) == ('embeddings', 'vectors')
    if preset == 'bert':
        layers = model.trunk.is_next, model.trunk.pooler[0], model.trunk.transform
        assert [group_of[id(layer.weight)] for layer in layers] == ['embeddings', 'matrices', 'matrices']

# -----------------------------------------------------------------------------
# Encoder-decoders: the source is seen whole, the target up to now


def pair_of(preset, **changes):
    """A tiny encoder-decoder in which no part is silent."""
    return awake(build(tiny(preset, **changes)))


def bucket(distance, both_sides, buckets=32, max_distance=128):
    """The rule of T5 for one distance, key - query, in plain numbers."""
    right = buckets // 2 if both_sides and distance > 0 else 0
    n, share = (abs(distance), buckets // 2) if both_sides else (max(0, -distance), buckets)
    exact = share // 2
    if n < exact:
        return right + n
    return right + min(share - 1, exact + int(math.log(n / exact) / math.log(max_distance / exact) * (share - exact) + 1e-6))


@pytest.mark.parametrize('both_sides, known', [
    (True, {0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -15: 9, -16: 10, -90: 14, -91: 15, -128: 15, -500: 15, 1: 17, 7: 23,
            8: 24, 16: 26, 90: 30, 91: 31, 500: 31}),
    (False, {0: 0, -1: 1, -15: 15, -16: 16, -18: 16, -19: 17, -112: 30, -113: 31, -128: 31, -9999: 31, 1: 0, 500: 0})])
def test_distances_fall_into_the_buckets_of_t5(both_sides, known):
    """32 buckets to a distance of 128: one by one while near, then by logarithm; an encoder halves them by side (b16)."""
    ours = distance_buckets(torch.tensor([list(known)]), both_sides)[0].tolist()
    assert dict(zip(known, ours, strict=True)) == known
    ours = distance_buckets(torch.arange(-300, 301)[None], both_sides)[0].tolist()
    assert ours == [bucket(d, both_sides) for d in range(-300, 301)]
    assert set(ours) == set(range(32)) - ({16} if both_sides else set()), 'all are used but "to the right at distance 0"'


@given(st.integers(4, 64), st.integers(2, 300), st.booleans())
@example(4, 2, False)
@example(256, 128, False)
def test_farther_is_never_a_lower_bucket_and_every_config_fits_its_table(buckets, max_distance, both_sides):
    """Whatever Config accepts: buckets rise by at most 1 a step near by, stay inside the table, and far is the last one."""
    try:
        Config(positions='relative', buckets=buckets, max_distance=max_distance)
    except ValueError as e:
        assert buckets >= 2 * max_distance and f'buckets={buckets}' in str(e), e
        return
    found = distance_buckets(-torch.arange(2 * max_distance)[None], both_sides, buckets, max_distance)[0]
    share = buckets // 2 if both_sides else buckets
    assert 0 <= found.min() and found.max() < buckets, f'{found.min()} to {found.max()} of {buckets}'
    assert found.diff().min() >= 0 and found[max_distance:].eq(share - 1).all(), found.tolist()
    assert found[:share // 2].tolist() == list(range(share // 2))
    right = distance_buckets(torch.arange(1, 2 * max_distance)[None], both_sides, buckets, max_distance)[0]
    same(right, found[1:] + share if both_sides else torch.zeros_like(right))


@settings(max_examples=15)
@given(st.booleans(), st.sampled_from(['relu', 'gelu']), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_the_transformer_equals_torchs_own_encoder_and_decoder(norm_first, activation, S, length, seed):
    """Both norm orders (b5), cross-attention and padding of the source (b3): logits, loss and the gradient of the table."""
    model = pair_of('transformer', norm_first=norm_first, activation=activation, mlp_dim=48, n_layer=2)
    theirs = []
    for stack, layer, whole in ((model.encoder, nn.TransformerEncoderLayer, nn.TransformerEncoder),
                                (model.decoder, nn.TransformerDecoderLayer, nn.TransformerDecoder)):
        last = nn.LayerNorm(32) if norm_first else None
        one = layer(32, 4, 48, 0.0, activation, batch_first=True, norm_first=norm_first)
        more = {'enable_nested_tensor': False} if stack is model.encoder else {}
        theirs.append(awake(whole(one, 2, last, **more)).train())  # in eval mode a fused road writes zeros under padding
        for its, block in zip(theirs[-1].layers, stack.blocks, strict=True):
            copy_torch_layer(its, block, cross=stack is model.decoder)
        if norm_first:
            stack.norm.load_state_dict(last.state_dict())
    encoder, decoder = theirs
    torch.manual_seed(seed)
    ids, decoder_ids, targets = some(2, S), some(2, length), some(2, length)
    keep = torch.arange(S) < torch.tensor([[S], [S // 2 + 1]])
    enter = lambda t: model.tokens.weight[t] * 32 ** 0.5 + sinusoids(T, 32)[:t.size(1)]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    memory = encoder(enter(ids), src_key_padding_mask=~keep)
    close(model.hidden(ids, keep)[keep], memory[keep], 1e-4)
    wanted = decoder(enter(decoder_ids), memory, tgt_mask=future, memory_key_padding_mask=~keep) @ model.tokens.weight.T
    logits, loss = model(ids, keep, decoder_ids, targets)
    close(logits, wanted, 2e-4)
    wanted = F.cross_entropy(wanted.flatten(0, 1), targets.flatten())
    close(loss, wanted, 1e-4)
    a, b = (torch.autograd.grad(y, model.tokens.weight)[0] for y in (loss, wanted))
    close(a / b.abs().max(), b / b.abs().max(), 1e-4)


def t5_by_hand(model, ids, keep, decoder_ids):
    """Logits of T5 from its weights by name, head by head: biases of distance in self-attention alone, nothing scaled."""
    w, D = model.state_dict(), 12
    rms = lambda x, name: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + '.weight']

    def attend(x, source, name, biases, hidden):
        q, k, v = w[name + '.qkv.weight'].split(4 * D)                                 # 3 x (H D, C)
        heads = []
        for h in range(4):
            rows = slice(h * D, (h + 1) * D)
            scores = (x @ q[rows].T) @ (source @ k[rows].T).transpose(1, 2)            # (B, T, S)
            scores = scores if biases is None else scores + biases[..., h]
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ (source @ v[rows].T))
        return torch.cat(heads, dim=-1) @ w[name + '.proj.weight'].T

    def run(stack, ids, hidden, memory=None):
        table, far, places = w[stack + '.distances.weight'], model.config.max_distance, range(ids.size(1))
        biases = torch.stack([torch.stack([table[bucket(j - i, memory is None, len(table), far)] for j in places])
                              for i in places])                                        # (T, T, H)
        x = w['tokens.weight'][ids]
        for i in range(2):
            name = f'{stack}.blocks.{i}'
            h = rms(x, name + '.attn_norm')
            x = x + attend(h, h, name + '.attn', biases, hidden)
            if memory is not None:
                x = x + attend(rms(x, name + '.cross_norm'), memory, name + '.cross', None, ~keep[:, None])
            h = rms(x, name + '.mlp_norm')
            x = x + F.relu(h @ w[name + '.mlp.fc.weight'].T) @ w[name + '.mlp.proj.weight'].T
        return rms(x, stack + '.norm')

    future = torch.ones(decoder_ids.size(1), decoder_ids.size(1), dtype=torch.bool).triu(1)
    h = run('decoder', decoder_ids, future, run('encoder', ids, ~keep[:, None]))
    return h * 32 ** -0.5 @ w['tokens.weight'].T


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(32, 128), (8, 20), (16, 33)]), st.integers(0, 99))
@example(40, 40, (8, 20), 0)
def test_t5_equals_the_formula_written_out(S, length, ranges, seed):
    """One table of distances for all blocks of a stack, none across (b16); unscaled scores; tied output over sqrt(C)."""
    model = pair_of('t5', block_size=40, buckets=ranges[0], max_distance=ranges[1]).double()
    torch.manual_seed(seed)
    ids, decoder_ids = some(2, S), some(2, length)
    keep = torch.arange(S) < torch.tensor([[S], [S // 2 + 1]])
    close(model(ids, keep, decoder_ids)[0], t5_by_hand(model, ids, keep, decoder_ids), 1e-9)


def test_the_distances_of_t5_are_one_table_a_stack_and_the_source_has_no_order_across():
    """Not one a block, none in cross-attention: a decoder cannot tell in which order it is handed the memory (b16)."""
    model = pair_of('t5')
    tables = [name for name, p in model.named_parameters() if p.shape == (32, 4)]
    assert tables == ['encoder.distances.weight', 'decoder.distances.weight']
    ids, memory, order = some(2, 7), torch.randn(2, 9, 32), torch.randperm(9)
    close(model.decoder(ids, memory=memory[:, order]), model.decoder(ids, memory=memory), 1e-4)
    h = model.hidden(ids)
    with torch.no_grad():
        model.encoder.distances.weight[bucket(-3, True)] += 2.0
    moved = (model.hidden(ids) - h).abs().amax(dim=(0, 2)) > 1e-4
    assert moved[3:].all(), f'what has a key three to its left does not feel its number: {moved.tolist()}'


@settings(max_examples=15)
@given(st.integers(2, 9), st.integers(0, 6), st.integers(0, 99))
def test_where_a_text_stands_does_not_matter_to_t5(length, shift, seed):
    """Only distances are told: padding on the left moves source and target on, and changes nothing."""
    model = pair_of('t5')
    torch.manual_seed(seed)
    ids, decoder_ids = some(2, length), some(2, length)
    keep = torch.arange(length + shift)[None].expand(2, -1) >= shift
    plain = model.decode(decoder_ids, cache=model.read(ids))
    far = [torch.cat([some(2, shift), t], dim=1) for t in (ids, decoder_ids)]
    close(model.decode(far[1], keep, model.read(far[0], keep)), plain, 1e-4)
    bias = model.encoder.with_distances(None, False, *[torch.arange(length)[None]] * 2)[0]  # (H, T, S)
    same(bias[:, 1:, 1:], bias[:, :-1, :-1])


@every_pair
@settings(max_examples=15)
@given(st.integers(2, T), st.integers(1, 9), st.integers(1, 7), st.data())
def test_a_target_sees_neither_its_future_nor_the_padding_of_its_source(preset, length, S, pads, data):
    """Change target token j, or what lies under the padding: all before j is equal bit for bit; j itself changes (b3)."""
    model, j = pair_of(preset), data.draw(st.integers(1, length - 1))
    ids, decoder_ids = some(2, S + pads), some(2, length)
    keep = (torch.arange(S + pads) < S).expand(2, -1)
    before = model(ids, keep, decoder_ids)[0]
    changed = decoder_ids.clone()
    changed[:, j:] = (decoder_ids[:, j:] + 1 + some(2, length - j) % (V - 1)) % V
    other = torch.where(keep, ids, (ids + 1) % V)
    after = model(other, keep, changed)[0]
    same(after[:, :j], before[:, :j])
    same(model(other, keep, decoder_ids)[0], before)
    assert not torch.equal(after[:, j], before[:, j]), 'the changed token does not matter at all'


@every_pair
def test_the_whole_source_reaches_every_position_of_the_target(preset):
    """By autograd: target t depends on every real source token, on the target up to t, and on nothing else (b3)."""
    model, seen = pair_of(preset), []
    model.tokens.register_forward_hook(lambda module, args, y: seen.append(y.requires_grad_()))
    keep = torch.arange(9)[None] < 6
    for t in (0, 3, 6):
        seen.clear()
        logits = model(some(1, 9), keep, some(1, 7))[0]
        source, target = torch.autograd.grad(logits[0, t].square().sum(), seen)
        reached = [(g[0].abs().sum(dim=-1) > 0).tolist() for g in (source, target)]
        assert reached == [[True] * 6 + [False] * 3, [i <= t for i in range(7)]], (t, reached)


@every_pair
@settings(max_examples=15)
@given(st.lists(st.integers(1, 8), min_size=2, max_size=4), st.integers(0, 5), st.sampled_from(['left', 'right', 'holes']))
def test_a_pair_in_a_batch_is_translated_as_it_is_alone(preset, lengths, more, side):
    """Batch-mates, amount and side of padding, ids under it: nothing matters to logits or loss of a row (b3, b10)."""
    model, total = pair_of(preset), max(lengths) + more
    n = torch.tensor(lengths)[:, None]
    keep = {'right': torch.arange(total) < n, 'left': torch.arange(total) >= total - n,
            'holes': torch.rand(len(n), total) < 0.5}[side]
    keep[:, total // 2] |= ~keep.any(dim=1)
    ids, decoder_ids, targets = some(len(n), total), some(len(n), 6), some(len(n), 6)
    logits, loss = model(ids, keep, decoder_ids, targets)
    alone = [model(ids[i:i + 1, keep[i]], None, decoder_ids[i:i + 1], targets[i:i + 1]) for i in range(len(n))]
    close(logits, torch.cat([row for row, _ in alone]), 2e-4)
    close(loss, torch.stack([one for _, one in alone]).mean(), 1e-4)


@every_pair
@given(cuts_of_a_sequence, st.integers(1, T))
def test_decoding_with_a_cache_reads_the_source_once_and_changes_nothing(preset, cuts, length):
    """Any pieces up to block_size: the logits of forward. Each block projects the memory once, and never looks again."""
    model, reads = pair_of(preset), []
    for i, block in enumerate(model.decoder.blocks):
        rest = block.cross.sizes[0] * block.cross.sizes[2]                             # keys and values come after H D rows
        def project(x, rows, cross=block.cross, i=i, rest=rest):
            reads.extend([i] if rows.start == rest else [])
            return Attention.project(cross, x, rows)
        block.cross.project = project
    model.encoder.register_forward_hook(lambda *_: reads.append('encoder'))
    ids, decoder_ids, keep = some(2, 5), some(2, length), torch.arange(5) < torch.tensor([[3], [5]])
    whole = model(ids, keep, decoder_ids)[0]
    reads.clear()
    cache = model.read(ids, keep)
    for start, end in chunks(cuts, length):
        close(model.decode(decoder_ids[:, start:end], cache=cache), whole[:, end - 1], 2e-4)
        cache['memory'] = torch.full_like(cache['memory'], math.nan)
    assert reads == ['encoder', 0, 1], f'read by {reads}'


@every_pair
@settings(max_examples=15)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=3), cuts_of_a_sequence)
def test_targets_padded_on_the_left_decode_as_each_alone(preset, lengths, cuts):
    """The masks of source and target are two: a cache keeps both, whole or in pieces (b3, b10)."""
    model, total = pair_of(preset), max(lengths) + 3
    keep = torch.arange(total) >= total - 3 - torch.tensor(lengths)[:, None]
    ids, decoder_ids = some(len(lengths), 7), some(len(lengths), total)
    source = torch.arange(7) < torch.tensor([[7], [2], [4]])[:len(lengths)]
    cache = model.read(ids, source)
    for start, end in chunks({*cuts, total - 3}, total):
        logits = model.decode(decoder_ids[:, start:end], None if start >= total - 3 else keep[:, start:end], cache)
    for i in range(len(lengths)):
        alone = model(ids[i:i + 1, source[i]], None, decoder_ids[i:i + 1, keep[i]])[0][:, -1]
        close(logits[i:i + 1], alone, 2e-4)


@every_pair
def test_source_and_target_each_have_block_size_tokens(preset):
    """Both full: fine. One more on either side: a line that names block_size, also in the middle of decoding (b10)."""
    model = pair_of(preset)
    model(some(1, T), None, some(1, T))
    cache = model.read(some(1, T))
    model.decode(some(1, T), cache=cache)
    for call in (lambda: model(some(1, T + 1), None, some(1, 2)), lambda: model(some(1, 2), None, some(1, T + 1)),
                 lambda: model.decode(some(1, 1), cache=cache)):
        with pytest.raises(ValueError) as error:
            call()
        assert f'block_size={T}' in one_line(error) and str(T + 1) in str(error.value), error.value


@every_pair
@pytest.mark.parametrize('tied', [True, False])
def test_source_target_and_output_share_one_matrix(preset, tied):
    """One table for all three, counted once; with an output of its own, only the tokens that occur have a gradient (b5)."""
    model = pair_of(preset, tied=tied)
    assert [name for name, p in model.named_parameters() if p.shape == (V, 32)] == \
        ['tokens.weight'] + ([] if tied else ['output.weight'])
    assert model.encoder.embed.tokens is model.decoder.embed.tokens is model.tokens
    assert (model.output.weight is model.tokens.weight) == tied
    model(torch.full((1, 4), 7), None, torch.full((1, 3), 8), torch.full((1, 3), 9))[1].backward()
    rows = (model.tokens.weight.grad.abs().sum(dim=1) > 0).nonzero().flatten().tolist()
    assert rows == (list(range(V)) if tied else [7, 8]), rows


@every_pair
def test_every_weight_of_an_encoder_decoder_has_a_gradient(preset):
    """Shapes, and a gradient that is finite and not 0 for every weight, in both stacks and between them."""
    model = pair_of(preset, dropout=0.1).train()
    logits, loss = model(some(3, 9), torch.arange(9) < torch.tensor([[9], [4], [1]]), some(3, 6), some(3, 6))
    assert logits.shape == (3, 6, V) and loss.shape == () and model(some(1, 2), None, some(1, 3))[1] is None
    assert model.hidden(some(3, 5)).shape == (3, 5, 32)
    assert model.decode(some(3, 4), cache=model.read(some(3, 5))).shape == (3, V)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), f'{name} has no gradient'


@every_pair
@pytest.mark.parametrize('half', [False, True])
def test_a_source_of_nothing_but_padding_poisons_nothing(preset, half):
    """All padding in one row, in float32 and bfloat16: everything finite, and the loss that of the other rows (b3)."""
    model = pair_of(preset, dropout=0.0).train()
    keep, targets = torch.arange(6) < torch.tensor([[0], [3], [6]]), some(3, 5)
    targets[0] = IGNORE
    ids, decoder_ids = some(3, 6), some(3, 5)
    with torch.autocast('cpu', torch.bfloat16, enabled=half):
        logits, loss = model(ids, keep, decoder_ids, targets)
        everything = model(ids, keep, decoder_ids, some(3, 5))[1]
        exact = model(ids[1:], keep[1:], decoder_ids[1:], targets[1:])[1]
    assert loss.dtype == torch.float32 and logits.isfinite().all() and model.decode(
        decoder_ids, cache=model.read(ids, keep)).isfinite().all()
    close(loss, exact, 0.02 if half else 1e-5)
    (loss + everything).backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), f'{name} has a gradient that is not finite'


@every_pair
def test_a_pair_that_asks_nothing_costs_nothing(preset):
    """All targets ignored, while smoothing: the loss is 0 and so is its gradient (b13)."""
    model = pair_of(preset, label_smoothing=0.1).train()
    _, loss = model(some(2, 5), None, some(2, 4), torch.full((2, 4), IGNORE))
    loss.backward()
    assert loss.item() == 0.0 and all(p.grad.count_nonzero() == 0 for p in model.parameters()), loss


@given(st.integers(1, 3), st.integers(1, 6), st.sets(st.integers(0, 17)), st.sampled_from([0.0, 0.1, 0.5]), st.booleans())
def test_a_smoothed_target_shares_some_of_its_probability(B, length, ignored, smoothing, counted):
    """(1 - e) at the target and e/V at each class, by hand and by F.cross_entropy; IGNORE costs nothing (b13)."""
    logits, targets = torch.randn(B, length, V) * 3, some(B, length)
    targets.view(-1)[[i for i in ignored if i < B * length]] = IGNORE
    asked = targets != IGNORE
    wanted = F.one_hot(targets[asked], V) * (1 - smoothing) + smoothing / V            # (N, V)
    total = -(wanted * logits[asked].log_softmax(-1)).sum()
    close(cross_entropy(logits, targets, 40 if counted else None, smoothing),
          total / (40 if counted else max(1, int(asked.sum()))), 1e-4)
    if asked.any():
        close(cross_entropy(logits, targets, None, smoothing),
              F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing), 1e-5)


@every_pair
def test_labels_are_smoothed_only_while_training(preset):
    """A validation loss is that of the plain targets, so that it can be compared; both divide by counts (b1, b13)."""
    model = pair_of(preset, dropout=0.0, label_smoothing=0.3)
    ids, decoder_ids, targets = some(2, 5), some(2, 4), some(2, 4)
    targets[0, 2:] = IGNORE
    for training, smoothing in ((True, 0.3), (False, 0.0)):
        logits, loss = model.train(training)(ids, None, decoder_ids, targets)
        flat = logits.flatten(0, 1), targets.flatten()
        close(loss, F.cross_entropy(*flat, label_smoothing=smoothing), 1e-5)
        total = F.cross_entropy(*flat, label_smoothing=smoothing, reduction='sum')
        close(model(ids, None, decoder_ids, targets, {'targets': 40})[1], total / 40, 1e-5)


@pytest.mark.parametrize('preset, task', [('gpt2', ''), ('bert', ''), ('lstm', ''), ('bert', 'tag')])
def test_label_smoothing_is_refused_where_no_loss_reads_it(preset, task):
    """--label_smoothing 0.3 elsewhere: an error at once, or it matters; nothing in silence (b13)."""
    ids = some(2, 6)
    targets, losses = ids % L, []
    for smoothing in (0.0, 0.3):
        try:
            model = awake(build(tiny(preset, task=task, n_labels=L if task else 0, label_smoothing=smoothing))).train()
        except ValueError as e:
            assert 'label_smoothing=0.3' in str(e), e
            return
        losses.append(model(ids, targets=targets)[1].item())
    assert abs(losses[0] - losses[1]) > 1e-3, f'the loss is {losses[0]} with smoothing and without'


@every_pair
@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(0, 99))
def test_micro_batches_of_pairs_add_up_to_one_big_batch(preset, size, seed):
    """Losses and gradients, smoothed, with rows of very unequal numbers of asked targets (b1)."""
    model = pair_of(preset, dropout=0.0, label_smoothing=0.1).train()
    torch.manual_seed(seed)
    batch = {'ids': some(5, 7), 'keep': torch.arange(7) < torch.randint(1, 8, (5, 1)), 'decoder_ids': some(5, 8),
             'targets': some(5, 8)}
    batch['targets'][torch.rand(5, 8) < torch.rand(5, 1)] = IGNORE
    count, total = {'targets': max(1, int((batch['targets'] != IGNORE).sum()))}, []
    for step in (5, size):
        model.zero_grad()
        losses = [model(**{key: t[i:i + step] for key, t in batch.items()}, counts=count if step < 5 else None)[1]
                  for i in range(0, 5, step)]
        sum(losses).backward()
        total.append([sum(losses).detach()] + [p.grad.clone() for p in model.parameters()])
    for big, small in zip(*total, strict=True):
        close(big, small, 1e-4 * max(1.0, big.abs().max().item()))


@every_pair
def test_dropout_of_a_pair_acts_in_training_and_never_at_evaluation(preset):
    """In source and in target; evaluated twice it is equal bit for bit, and decoding too (b2)."""
    model, ids, decoder_ids = pair_of(preset, dropout=0.5), some(2, 9), some(2, 5)
    same(model(ids, None, decoder_ids)[0], model(ids, None, decoder_ids)[0])
    same(model.decode(decoder_ids, cache=model.read(ids)), model.decode(decoder_ids, cache=model.read(ids)))
    model.encoder.train()
    assert (model(ids, None, decoder_ids)[0] - model(ids, None, decoder_ids)[0]).abs().max() > 1e-2
    model.eval().decoder.train()
    assert (model(ids, None, decoder_ids)[0] - model(ids, None, decoder_ids)[0]).abs().max() > 1e-2


@every_pair
def test_a_new_encoder_decoder_knows_nothing_yet(preset):
    """Its first loss is a little above ln V: logits of about size 1, neither silent nor sure."""
    model = build(tiny(preset, vocab_size=2000, n_embd=64)).eval()
    with torch.no_grad():
        batch = [torch.randint(2000, (4, T)) for _ in range(3)]
        logits, loss = model(batch[0], None, *batch[1:])
    excess = loss.item() - math.log(2000)
    assert 0.1 < excess < 1.5 and 0.5 < logits.std() < 2, f'{excess:.4f} above ln V, logits of size {logits.std():.2f}'


@every_pair
def test_attention_of_a_new_pair_is_undecided(preset, monkeypatch):
    """Scores of size 1 or so: a softmax that starts nearly one-hot learns slowly. Without 1/sqrt(D), queries start small."""
    sizes = []

    def spy(q, k, v, mask, causal, scale, dropout):
        sizes.append((q @ k.transpose(-2, -1) * (scale or q.size(-1) ** -0.5)).std().item())
        return attention(q, k, v, mask, causal, scale, dropout)

    monkeypatch.setattr('model.attention', spy)
    build(tiny(preset, n_embd=128, head_dim=32)).eval()(some(2, T), None, some(2, T))
    assert len(sizes) == 6 and max(sizes) < 3, [round(size, 2) for size in sizes]


def test_the_weights_of_the_published_pairs_add_up():
    """By reasoning: an encoder block has one attention and one MLP, a decoder block two attentions; one table for all."""
    C, attention_, mlp = 512, 4 * 512 * 512, 2 * 512 * 2048
    t5 = 32128 * C + 6 * (attention_ + mlp + 2 * C) + 6 * (2 * attention_ + mlp + 3 * C) + 2 * C + 2 * 32 * 8
    attention_, mlp, norm = attention_ + 4 * C, mlp + 2048 + C, 2 * C  # biases
    base = 37000 * C + 6 * (attention_ + mlp + 2 * norm) + 6 * (2 * attention_ + mlp + 3 * norm)
    for name, wanted in (('t5-small', t5), ('transformer-base', base)):
        with torch.device('meta'):
            found = sum(p.numel() for p in build(PRESETS[name]).parameters())
        assert found == wanted == {'t5-small': 60506624, 'transformer-base': 63082496}[name], (name, found, wanted)


@every_pair
def test_a_pair_comes_back_from_its_file_as_it_was(preset, tmp_path):
    """Configuration, weights, tying and sharing, logits, labels in any script; block_size may shrink (b10)."""
    model, path = pair_of(preset), tmp_path / '翻译 🙂 e\u0301.pt'
    save(path, model, words=['猫', '🙂', 'e\u0301'])
    again, checkpoint = load(path)
    assert type(again) is EncoderDecoder and again.config == model.config and checkpoint['words'] == ['猫', '🙂', 'e\u0301']
    assert again.output.weight is again.tokens.weight
    assert again.encoder.embed.tokens is again.decoder.embed.tokens is again.tokens
    for name, p in model.state_dict().items():
        same(p, again.state_dict()[name])
    ids, decoder_ids = some(2, 7), some(2, 7)
    same(model(ids, None, decoder_ids)[0], again.eval()(ids, None, decoder_ids)[0])
    shorter = load(path, block_size=7)[0].eval()
    close(shorter(ids, None, decoder_ids)[0], model(ids, None, decoder_ids)[0], 1e-5)
    with pytest.raises(ValueError, match='block_size=7'):
        shorter(some(1, 8), None, some(1, 2))
    content = torch.load(path, weights_only=True)
    del content['model']['decoder.blocks.1.cross.qkv.weight']
    torch.save(content, path)
    with pytest.raises(ValueError) as error:
        load(path)
    assert 'decoder.blocks.1.cross.qkv.weight' in one_line(error) and 'missing' in str(error.value)


@every_pair
def test_optimizer_groups_of_a_pair_hold_each_weight_once(preset):
    """The shared table once (b5); distances lie beside it: one row a bucket is no matrix that Muon may turn."""
    model = build(tiny(preset))
    groups = {group['name']: group for group in optimizer_groups(model, 0.3)}
    ids = [id(p) for group in groups.values() for p in group['params']]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    tables = [model.tokens.weight]
    if preset == 't5':
        tables += [model.encoder.distances.weight, model.decoder.distances.weight]
    assert {id(p) for p in groups['embeddings']['params']} == {id(p) for p in tables}
    for name, group in groups.items():
        assert group['weight_decay'] == (0.0 if name == 'vectors' else 0.3), name
        assert all((p.dim() < 2) == (name == 'vectors') for p in group['params']), name


@every_pair
def test_an_encoder_decoder_learns_to_turn_a_text_round(preset):
    """Four padded pairs by heart, then written greedily from the start token alone: nothing was seen in advance (b3, b4)."""
    torch.manual_seed(3)
    model = build(tiny(preset, n_layer=1, n_embd=16, n_head=2, head_dim=8, mlp_dim=32, dropout=0.0))
    texts = 2 + torch.randperm(V - 2)[:20].view(4, 5)
    keep = torch.arange(7)[None].expand(4, -1) < 5
    ids, targets = torch.cat([texts, some(4, 2)], dim=1), texts.flip(1)
    start = torch.zeros(4, 1, dtype=torch.long)
    optimizer = torch.optim.AdamW(optimizer_groups(model, 0.0), lr=0.02)
    for _ in range(60):
        loss = model(ids, keep, torch.cat([start, targets[:, :-1]], dim=1), targets)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    cache, token, written = model.read(ids, keep), start, []
    for _ in range(5):
        token = model.decode(token, cache=cache).argmax(dim=1, keepdim=True)
        written.append(token)
    right = torch.cat(written, dim=1) == targets
    assert right.all(), f'{right.sum()} of 20 tokens right, loss {loss:.3f}'



@every_pair
@settings(max_examples=12)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), cuts_of_a_sequence, st.integers(1, 10), st.integers(0, 99))
def test_beams_that_share_a_source_are_beams_with_copies_of_it(preset, sources, beams, S, cuts, length, seed):
    """More rows than sources: neighbouring rows ask one source together, several new tokens at once, padding or not (b3)."""
    model = pair_of(preset)
    torch.manual_seed(seed)
    ids, decoder_ids, rows = some(sources, S), some(sources * beams, length), sources * beams
    for keep in (None, torch.arange(S) >= torch.randint(0, S, (sources, 1))):
        # their own targets may begin with padding, too; the last token is real in all rows
        own = None if keep is None else torch.arange(length) >= torch.randint(0, length, (rows, 1))
        copies = None if keep is None else keep.repeat_interleave(beams, dim=0)
        shared, copied = model.read(ids, keep), model.read(ids.repeat_interleave(beams, dim=0), copies)
        for start, end in chunks(cuts, length):
            piece = decoder_ids[:, start:end], None if own is None else own[:, start:end]
            close(model.decode(*piece, shared), model.decode(*piece, copied), 1e-4)
        assert len(shared[0]['cross']['k']) == len(shared['memory']) == sources, 'the source was copied'
        together = model.decode(decoder_ids, own, model.read(ids, keep))
        for row in range(rows):
            b, real = row // beams, slice(None) if own is None else own[row]
            alone = model(ids[b:b + 1] if keep is None else ids[b:b + 1, keep[b]], None, decoder_ids[row:row + 1, real])[0]
            close(together[row], alone[0, -1], 1e-4)


@settings(max_examples=8)
@given(st.sampled_from(['gpt2', 'palm', 'llama', 'nano']), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_every_kind_of_block_lets_beams_share_a_source(preset, sources, beams, length):
    """Side by side or one after the other, grouped heads, normalised queries, turned positions: with a cache and without."""
    stack = awake(Stack(tiny(preset), nn.Embedding(V, 32), causal=True, cross=True))
    ids, memory = some(sources * beams, length), torch.randn(sources, 5, 32)
    keep = torch.arange(5) < torch.tensor([[5], [2], [3]])[:sources]
    whole = stack(ids, memory=memory.repeat_interleave(beams, dim=0), memory_keep=keep.repeat_interleave(beams, dim=0))
    close(stack(ids, memory=memory, memory_keep=keep), whole, 1e-4)
    close(stack(ids, memory=memory, memory_keep=keep, cache={}), whole, 1e-4)

# -----------------------------------------------------------------------------
# Loading draws and copies nothing; the same weights under other sizes

MODELS = [*((preset, '') for preset in (*ROWS, *PAIRS)), ('bert', 'classify'), ('llama', 'tag'), ('lstm', 'qa')]
every_model = pytest.mark.parametrize('preset, task', MODELS, ids=[' '.join(names).strip() for names in MODELS])


def made_for(task, preset, **changes):
    """A tiny model of any kind, in which no part is silent."""
    return awake(build(tiny(preset, task=task, n_labels=3 if task in ('classify', 'tag') else 0, **changes)))


def questions(model, B, length):
    """A batch that asks a model of any kind something at every place: arguments of forward()."""
    task, ids = model.config.task, some(B, length)
    targets = {'classify': torch.randint(3, (B,)), 'tag': torch.randint(3, (B, length)),
               'qa': torch.randint(length, (B, 2))}.get(task, some(B, length))
    return {'ids': ids, 'targets': targets, **({'decoder_ids': some(B, length)} if model.config.arch == 'encdec' else {})}


@every_model
def test_loading_draws_no_random_numbers_and_leaves_nothing_without_memory(preset, task, tmp_path):
    """Built on no device, then filled: parameters, and tables of positions that no file holds, are real and as built."""
    model, path = made_for(task, preset), tmp_path / 'ckpt.pt'
    save(path, model)
    for changes in ({}, {'dropout': 0.25, 'block_size': 5}):
        state = torch.get_rng_state()
        again, checkpoint = load(path, **changes)
        same(torch.get_rng_state(), state)
        built = made_for(task, preset, **changes)
        assert [(name, p.shape) for name, p in again.named_parameters()] == \
            [(name, p.shape) for name, p in built.named_parameters()], 'a tied weight is one parameter'
        assert [name for name, _ in again.named_buffers()] == [name for name, _ in built.named_buffers()]
        for name, buffer in built.named_buffers():
            same(dict(again.named_buffers())[name], buffer)
        assert {t.device.type for t in (*again.parameters(), *again.buffers())} == {'cpu'}
        assert all(type(p) is nn.Parameter and p.requires_grad and p.dtype == torch.float32 for p in again.parameters())
    again, checkpoint = load(path)
    for name, p in again.named_parameters():
        assert p.data_ptr() == checkpoint['model'][name].data_ptr(), f'{name} was copied: a large model needs memory twice'


@every_model
def test_a_loaded_model_learns_as_the_one_that_was_saved(preset, task, tmp_path):
    """Its weights are live, also those that an LSTM keeps in a list of its own: four steps, bit for bit the same losses."""
    model, losses = made_for(task, preset), []
    save(tmp_path / 'ckpt.pt', model)
    batch = questions(model, 3, 7)
    for m in (model, load(tmp_path / 'ckpt.pt')[0]):
        torch.manual_seed(3)  # of dropout
        optimizer, found = torch.optim.SGD(m.train().parameters(), 0.02), []
        for _ in range(4):
            loss = m(**batch)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == losses[1], f'{losses[0]} before saving, {losses[1]} after loading'
    assert losses[1][-1] < losses[1][0], f'nothing is learned: {losses[1]}'


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_load_as_float32(dtype, tmp_path):
    """Whole numbers are no weights."""
    model = awake(build(tiny('llama')))
    save(tmp_path / 'ckpt.pt', model.to(dtype))
    for name, p in load(tmp_path / 'ckpt.pt')[0].named_parameters():
        same(p, dict(model.named_parameters())[name].float())
    content = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    content['model']['decoder.norm.weight'] = torch.ones(32, dtype=torch.int64)
    torch.save(content, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError) as error:
        load(tmp_path / 'ckpt.pt')
    assert 'decoder.norm.weight' in one_line(error) and 'int64' in str(error.value), error.value


@every_model
def test_an_absurd_number_of_layers_is_refused_at_once(preset, task, tmp_path, monkeypatch):
    """A billion blocks without memory would still take hours: what the file cannot hold is not built."""
    path = tmp_path / '坏.pt'
    save(path, made_for(task, preset))
    content = torch.load(path, weights_only=True)
    content['config']['n_layer'] = 10 ** 9
    torch.save(content, path)
    monkeypatch.setattr(sys.modules['model'], 'build', lambda config: pytest.fail(f'{config.n_layer} layers are built'))
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(path) in one_line(error) and 'n_layer=1000000000' in str(error.value), error.value


@every_model
@settings(max_examples=5)
@given(added=st.integers(1, 9), shorter=st.integers(0, T - 7), seed=st.integers(0, 99))
def test_more_tokens_and_fewer_positions_change_nothing_of_what_was_there(preset, task, added, shorter, seed):
    """Old rows stay bit for bit, new ones are nearly the mean of them; what the model says of old tokens stays as it was."""
    model = made_for(task, preset)
    torch.manual_seed(seed)
    batch = {key: t for key, t in questions(model, 2, 7).items() if key != 'targets'}
    other = resized(model, 'x', vocab_size=V + added, block_size=T - shorter).eval()
    assert other.config == dataclasses.replace(model.config, vocab_size=V + added, block_size=T - shorter)
    tables = 0
    for name, p in model.named_parameters():
        q = dict(other.named_parameters())[name]
        same(q[:len(p)], p[:len(q)])
        if len(q) > len(p):
            off, tables = (q[V:] - p.mean(dim=0)).abs().max().item(), tables + 1
            assert q.shape == (V + added, *p.shape[1:]) and 0 < off < 0.06, f'{name}: new rows are up to {off:.3f} off'
            assert len(q[V:].unique(dim=0)) == added, 'two new tokens are the same'
    trunk = getattr(model, 'trunk', model)
    assert tables == len({id(p) for p in (trunk.tokens.weight, *trunk.output.parameters())}), f'{tables} tables grew'
    new = getattr(other, 'trunk', other)
    assert (new.output.weight is new.tokens.weight) == model.config.tied
    close(other.hidden(batch['ids']), model.hidden(batch['ids']), 1e-5)
    logits = other(**batch)[0]
    close(logits if task else logits[..., :V], model(**batch)[0], 1e-4)
    batch['ids'][:, 3] = V + added - 1
    assert other(**batch)[0].isfinite().all()


def test_resizing_to_the_same_size_is_nothing_and_to_a_longer_one_is_refused():
    """No copy is made where nothing changes; what was trained with 16 positions knows no 17th."""
    model = awake(build(tiny('gpt2')))
    assert resized(model, 'x') is model
    with pytest.raises(ValueError, match='block_size=17 is longer than the 16 that x was trained with'):
        resized(model, 'x', block_size=T + 1)

# -----------------------------------------------------------------------------
# Optimizer groups, and the examples in the docstrings


@every_preset
def test_optimizer_groups_share_out_all_weights_and_vectors_never_decay(preset):
    """Each weight once, a tied one too (b5); biases and norms do not decay; matrices are what Muon may turn."""
    model = build(tiny(preset))
    groups = {group['name']: group for group in optimizer_groups(model, 0.3)}
    ids = [id(p) for group in groups.values() for p in group['params']]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    for name, group in groups.items():
        assert group['params'], f'{name} is empty'
        assert group['weight_decay'] == (0.0 if name == 'vectors' else 0.3), name
        assert all((p.dim() < 2) == (name == 'vectors') for p in group['params']), name
    tables = [model.tokens.weight, *([] if model.config.tied else [model.output.weight])]
    if model.config.positions == 'learned':
        tables += [(model.encoder if preset == 'bert' else model.decoder).embed.positions.weight]
    if preset == 'bert':
        tables += [model.encoder.embed.segments.weight, model.is_next.weight]
    assert {id(p) for p in groups['embeddings']['params']} == {id(p) for p in tables}
    assert ('vectors' in groups) == (model.config.bias or model.config.norm_weight), 'nano has no vectors at all'
    model.tokens.weight.requires_grad_(False)
    frozen = [p for group in optimizer_groups(model, 0.3) for p in group['params']]
    assert len(frozen) == len(ids) - 1 and all(p is not model.tokens.weight for p in frozen), 'a frozen weight takes part'


def test_the_examples_in_the_docstrings_are_true():
    """What model.py shows at a prompt is what it answers."""
    result = doctest.testmod(sys.modules['model'])
    assert result.attempted >= 2 and result.failed == 0, result


def test_published_sizes_have_the_published_window():
    """Of a model without learned positions no number of parameters tells it."""
    found = {name: config.block_size for name, config in PRESETS.items() if '-' in name}
    assert found == {'transformer-base': 512, 't5-small': 512, 'bert-base': 512, 'gpt2-124m': 1024, 'palm-8b': 2048,
                     'llama-7b': 2048}
