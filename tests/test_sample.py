"""
sample.py: which token is chosen, how a text goes on, when bytes become characters, what a score is, and the command.

Models here are tiny and random, with weights wide enough that no two logits come close to each other. Where a model would
only blur the question, one that knows its answers by heart (`ByHeart`) takes its place.
"""

import dataclasses
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, command
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import prepare_data
import sample
from model import PRESETS, build, save
from prepare_data import bpe_tokenizer, byte_tokenizer, char_tokenizer, tokenizer_to_dict
from sample import Settings, TextStream, choose, forbidden_tokens, generate, score_file, text_loss, text_scores, write

NAMES = ['gpt2', 'palm', 'llama', 'nano', 'lstm']
VERSE = '人之初，性本善。\n性相近，习相远。\n'
CHARACTERS = set(VERSE + 'abc é😀')
STORY = VERSE + 'Once upon a time, a café: 😀👍🏽 e\u0301 👨‍👩‍👧.\n'


def tiny(preset, vocab_size, block_size=8, seed=0, **changes):
    """A model of two small layers. Its weights are random and wide: even `nano`, which starts at zero, has opinions."""
    config = dataclasses.replace(PRESETS[preset], vocab_size=vocab_size, block_size=block_size, n_layer=2, n_head=2,
                                 n_kv_head=min(PRESETS[preset].n_kv_head, 1), n_embd=16, mlp_dim=24, **changes)
    model = build(config)
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


class ByHeart:
    """A model for `generate` that says what it was told: logits(step) -> (B, V). `fed` is how much it had to read."""

    def __init__(self, logits, block_size=8):
        self.logits, self.fed = logits, []
        self.config = dataclasses.replace(PRESETS['gpt2'], block_size=block_size)

    def decode(self, ids, cache=None):
        self.fed.append(ids.size(1))
        return self.logits(len(self.fed) - 1)


class Pieces:
    """A tokenizer for TextStream whose token i is the i-th piece of some bytes."""

    def __init__(self, pieces):
        self.decode_single_token_bytes = pieces.__getitem__


def streamed(pieces, stops=()):
    """What a TextStream makes of pieces of bytes: (the text, whether it stopped)."""
    stream = TextStream(Pieces(pieces), stops)
    return ''.join([stream.add(i) for i in range(len(pieces))] + [stream.end()]), stream.stopped

# -----------------------------------------------------------------------------
# choose

FOUR = torch.tensor([0.10, 0.50, 0.15, 0.25]).log()


def probabilities(logits, n=20000, **how):
    """What `choose` draws with: the share of an even grid of n draws that lands on each token, exact to 1/n."""
    tokens = choose(logits.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n, **how)
    return torch.bincount(tokens, minlength=len(logits)) / n


@pytest.mark.parametrize('how, expected', [
    ({}, [0.10, 0.50, 0.15, 0.25]),
    ({'temperature': 0.5}, [0.0290, 0.7246, 0.0652, 0.1812]),              # squares: .01 .25 .0225 .0625 / .345
    ({'temperature': 2.0}, [0.1655, 0.3701, 0.2027, 0.2617]),              # roots: .316 .707 .387 .5 / 1.911
    ({'temperature': 0}, [0, 1, 0, 0]),
    ({'top_k': 1}, [0, 1, 0, 0]),
    ({'top_k': 2}, [0, 2 / 3, 0, 1 / 3]),
    ({'top_k': 3}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
    ({'top_k': 4}, [0.10, 0.50, 0.15, 0.25]),
    ({'top_k': 99}, [0.10, 0.50, 0.15, 0.25]),
    ({'top_p': 0.0}, [0, 1, 0, 0]),
    ({'top_p': 0.49}, [0, 1, 0, 0]),
    ({'top_p': 0.51}, [0, 2 / 3, 0, 1 / 3]),                               # .50 is too little: the one that crosses is in
    ({'top_p': 0.74}, [0, 2 / 3, 0, 1 / 3]),
    ({'top_p': 0.76}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
    ({'top_p': 0.91}, [0.10, 0.50, 0.15, 0.25]),
    ({'top_p': 1.0}, [0.10, 0.50, 0.15, 0.25]),
    ({'top_k': 2, 'top_p': 0.6}, [0, 1, 0, 0]),                            # of the two, the first has 2/3
    ({'top_k': 2, 'top_p': 0.7}, [0, 2 / 3, 0, 1 / 3]),
    ({'temperature': 0.5, 'top_p': 0.73}, [0, 0.8, 0, 0.2]),               # top-p counts what temperature left
], ids=str)
def test_choose_draws_with_the_probabilities_worked_out_by_hand(how, expected):
    """Four tokens of 0.10, 0.50, 0.15 and 0.25, out of order on purpose. b12"""
    found = probabilities(FOUR, **how)
    assert torch.allclose(found, torch.tensor(expected, dtype=found.dtype), atol=2e-4), f'{how}: {found} for {expected}'


def test_top_p_keeps_one_of_two_equals_where_one_reaches_p():
    """Exactly p is enough: "the smallest set with mass >= p". b12"""
    assert probabilities(torch.tensor([0.0, 0.0, -math.inf]), top_p=0.5).tolist() == [1, 0, 0]


LOGITS = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=12).map(torch.tensor)  # ties are common


@given(LOGITS, st.sampled_from([1.0, 1.5, 3.0]), st.integers(0, 14), st.one_of(st.just(1.0), st.floats(0, 1)))
def test_choose_keeps_the_best_and_no_more_than_asked(logits, temperature, top_k, top_p):
    """Exactly k survive, also among ties; of these the smallest set with mass >= p; the rest keep their ratios. b12"""
    found = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    kept, p = found > 0, (logits.double() / temperature).softmax(dim=-1)
    k = min(top_k, len(logits)) if top_k else len(logits)
    p = p / p.topk(k).values.sum()
    assert 1 <= kept.sum() <= k, f'{kept.sum()} survive, not 1 to {k}'
    assert logits[kept].min() >= (logits[~kept].max() if (~kept).any() else -math.inf), f'{found} of {logits}'
    if top_p == 1:
        assert kept.sum() == k, f'{kept.sum()} survive, not {k}'
    else:
        mass, least = p[kept].sum(), p[kept].min()
        assert mass >= top_p - 1e-9, f'the survivors have {mass}, less than {top_p}'
        assert kept.sum() == 1 or mass - least < top_p + 1e-9, f'{mass} reaches {top_p} without the last, {least}, too'
    expected = torch.where(kept, p, 0) / p[kept].sum()
    assert (found - expected).abs().max() < 2e-4, f'{found} for {expected}'


@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_top_k_1_and_top_p_0_and_temperature_0_are_greedy(logits, draw):
    """Three names of one thing, also where two tokens are equally good. b12"""
    uniform = torch.tensor([draw], dtype=torch.float64)
    chosen = [choose(logits[None], uniform, **how).item() for how in
              ({'temperature': 0}, {'top_k': 1}, {'top_p': 0.0}, {'top_k': 3, 'top_p': 0.0}, {'temperature': 0, 'top_k': 2})]
    assert logits[chosen[0]] == logits.max() and len(set(chosen)) == 1, f'{chosen} of {logits}'


@pytest.mark.parametrize('how', [{}, {'top_k': 3}, {'top_p': 0.9}], ids=str)
@pytest.mark.parametrize('temperature', [1e-307, 1e-50, 1e-8, 1e9, 1e39, 1e300])
def test_no_temperature_is_too_cold_or_too_hot(temperature, how):
    """Cold is greedy, hot is even among the allowed; nothing divides 0 by 0, and -inf stays out."""
    found = probabilities(torch.tensor([-math.inf, 10.0, 30.0, -math.inf, 20.0]), temperature=temperature, **how)
    expected = torch.tensor([0, 0, 1, 0, 0] if temperature < 1 else [0, 1 / 3, 1 / 3, 0, 1 / 3])
    assert (found - expected).abs().max() < 2e-4, f'{found} at temperature {temperature}'


@given(st.lists(st.tuples(st.floats(-1e4, 1e4, width=32), st.booleans()), min_size=1, max_size=8), st.data())
def test_a_forbidden_token_is_never_chosen(tokens, data):
    """A logit of -inf has no chance, whatever the flags, and not at the ends of the draw either."""
    keep = data.draw(st.integers(0, len(tokens) - 1))
    logits = torch.tensor([[x if ok or i == keep else -math.inf for i, (x, ok) in enumerate(tokens)]])
    how = {'temperature': data.draw(st.sampled_from([0, 1e-8, 0.8, 1.0, 1e8])),
           'top_k': data.draw(st.sampled_from([0, 0, 1, 2, 9])),
           'top_p': data.draw(st.one_of(st.just(1.0), st.floats(0, 1)))}
    for draw in (0.0, data.draw(st.floats(0, 1, exclude_max=True)), 1 - 2 ** -53):
        token = choose(logits, torch.tensor([draw], dtype=torch.float64), **how).item()
        assert logits[0, token] > -math.inf, f'{token} of {logits} at the draw {draw} with {how}'


def test_the_ends_of_the_draw_belong_to_the_first_and_the_last_allowed():
    """A draw of exactly 0 passes over a first token that is forbidden, one just below 1 does not run past the last."""
    logits, uniform = torch.tensor([[-math.inf, 0, 0, -math.inf]] * 2), torch.tensor([0, 1 - 2 ** -53], dtype=torch.float64)
    assert choose(logits, uniform).tolist() == [1, 2]
    assert sorted(choose(logits, uniform, top_k=3).tolist()) == sorted(choose(logits, uniform, top_p=0.9).tolist()) == [1, 2]


def test_frequencies_follow_the_softmax():
    """20,000 seeded draws; each share stays within five standard deviations of its probability."""
    n, logits = 20000, torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5])
    uniform = torch.from_numpy(np.random.default_rng(0).random(n))
    found, p = torch.bincount(choose(logits.expand(n, -1), uniform), minlength=5) / n, logits.softmax(dim=-1)
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all(), f'{found} for {p}'


def test_choose_is_a_pure_function_of_each_row():
    """The same draw gives the same token, alone or in a batch; neither the logits nor torch's own generator move."""
    logits, uniform = torch.randn(6, 9), torch.rand(6, dtype=torch.float64)
    before, state = logits.clone(), torch.get_rng_state()
    for how in ({}, {'temperature': 0.5}, {'top_k': 3}, {'top_p': 0.7}, {'top_k': 4, 'top_p': 0.7}, {'temperature': 0}):
        together = choose(logits, uniform, **how)
        alone = torch.cat([choose(logits[i:i + 1], uniform[i:i + 1], **how) for i in range(6)])
        assert torch.equal(together, alone), f'{how}: {together} together, {alone} alone'
    assert torch.equal(logits, before) and torch.equal(torch.get_rng_state(), state)

# -----------------------------------------------------------------------------
# generate


@given(st.sampled_from(NAMES), st.integers(1, 9), st.integers(1, 14), st.integers(1, 3), st.integers(0, 99))
@example('gpt2', 8, 8, 2, 0)
@example('llama', 8, 3, 1, 0)
@example('lstm', 5, 14, 2, 0)
@example('nano', 1, 2, 1, 0)
@settings(max_examples=40)
def test_greedy_text_is_what_the_model_says_without_a_cache(preset, block_size, prompt, rows, seed):
    """Prompts shorter than, as long as and longer than the window, and on across its end. b10"""
    model = tiny(preset, 30, block_size, seed)
    ids = torch.randint(30, (rows, prompt))
    found = torch.stack(list(generate(model, ids, 20, temperature=0)), dim=1)
    window, slow = ids[:, -block_size:], []
    for _ in range(20):
        if window.size(1) > block_size:
            window = window[:, -max(1, block_size // 2):]                  # the older half is forgotten
        slow.append(model(window)[0][:, -1].argmax(dim=-1))
        window = torch.cat([window, slow[-1][:, None]], dim=1)
    assert torch.equal(found, torch.stack(slow, dim=1)), f'{found} is not {torch.stack(slow, dim=1)}'


def test_a_step_reads_one_token_until_the_window_is_full():
    """Window of 4, prompt of 3. After one more it is full, so 2 are read again; likewise 3 tokens later."""
    model = ByHeart(lambda step: torch.zeros(1, 5), block_size=4)
    list(generate(model, torch.zeros(1, 3, dtype=torch.long), 7))
    assert model.fed == [3, 1, 2, 1, 1, 2, 1], model.fed


@pytest.mark.parametrize('preset', NAMES[:-1])
def test_decode_raises_past_the_limit(preset):
    """Up to block_size it works, with a cache and without; one more is a clear error, not a wrong position. b10"""
    model, ids = tiny(preset, 30, 8), torch.zeros(1, 9, dtype=torch.long)
    cache = {}
    model.decode(ids[:, :8])
    for i in range(8):
        model.decode(ids[:, i:i + 1], cache=cache)
    for new, old in ((ids, None), (ids[:, :1], cache)):
        with pytest.raises(ValueError, match='9 tokens is longer than block_size=8'):
            model.decode(new, cache=old)


@given(st.sampled_from(NAMES), st.integers(1, 11), st.integers(0, 99), st.sampled_from([{}, {'top_k': 5}, {'top_p': 0.8}]))
def test_a_sample_does_not_depend_on_its_neighbours(preset, prompt, seed, how):
    """Row i alone is row i among three, and among neighbours that continue something else."""
    model, ids = tiny(preset, 30, 8), torch.randint(30, (1, prompt))
    others = torch.randint(30, (3, prompt))
    three = torch.stack(list(generate(model, ids.expand(3, -1), 15, 1.0, **how, seed=seed)))            # (15, 3)
    for row in range(3):
        mixed = others.clone()
        mixed[row] = ids[0]
        mixed = torch.stack(list(generate(model, mixed, 15, 1.0, **how, seed=seed)))[:, row]
        alone = torch.stack(list(generate(model, ids, 15, 1.0, **how, seed=seed, first_row=row)))[:, 0]
        assert torch.equal(alone, three[:, row]), f'row {row}: {alone} alone, {three[:, row]} among three'
        assert torch.equal(alone, mixed), f'row {row}: {alone} alone, {mixed} among strangers'


def test_every_row_and_every_step_has_a_draw_of_its_own():
    """A model without opinions over a million tokens: no token comes twice, from the first on, nor under another seed."""
    model, ids = ByHeart(lambda step: torch.zeros(4, 10 ** 6)), torch.zeros(4, 1, dtype=torch.long)
    draws = [torch.stack(list(generate(model, ids, 5, 1.0, seed=seed))) for seed in (0, 1)]
    assert len(set(draws[0][0].tolist())) == 4, f'the first tokens of four samples: {draws[0][0]}'
    assert len(set(torch.cat(draws).flatten().tolist())) == 40, f'40 draws, but {draws}'
    torch.manual_seed(1)
    again = torch.stack(list(generate(model, ids, 5, 1.0, seed=0)))
    assert torch.equal(draws[0], again), 'the same seed gave another text, after torch itself was seeded otherwise'


@pytest.mark.parametrize('how', [{'temperature': 0}, {'temperature': 50.0}, {'temperature': 1.0, 'top_k': 63},
                                 {'temperature': 1.0, 'top_p': 0.999}], ids=str)
def test_rows_of_a_padded_vocabulary_are_never_sampled(how):
    """64 rows for 60 tokens: the last four would be the likeliest of all, and still never come."""
    logits = torch.randn(8, 64)
    logits[:, 60:] += 9
    forbidden = torch.arange(64) >= 60
    tokens = torch.stack(list(generate(ByHeart(lambda step: logits), torch.zeros(8, 1, dtype=torch.long), 100, **how,
                                       forbidden=forbidden)))
    assert tokens.max() < 60, f'{(tokens >= 60).sum()} tokens that decode to nothing'


def test_only_text_and_the_end_of_a_document_may_be_written():
    """Of 256 bytes, 105 special tokens and 23 rows of padding: the bytes and <|endoftext|>."""
    forbidden = forbidden_tokens(byte_tokenizer(), 384)
    end_id = byte_tokenizer()._special_tokens['<|endoftext|>']
    assert forbidden.shape == (384,) and (~forbidden).nonzero().flatten().tolist() == [*range(256), end_id]


def test_a_row_that_has_ended_stays_ended_and_all_rows_end_the_whole():
    """Row 0 says 9 (the end) third, row 1 first: row 1 waits, whatever its model says, and nothing comes after both."""
    script = torch.tensor([[1, 9], [2, 5], [9, 6], [3, 7]])
    model = ByHeart(lambda step: F.one_hot(script[step], 10).float())
    tokens = torch.stack(list(generate(model, torch.zeros(2, 1, dtype=torch.long), 4, temperature=0, end_id=9)))
    assert tokens.tolist() == [[1, 9], [2, 9], [9, 9]] and len(model.fed) == 3, f'{tokens}, {len(model.fed)} steps'
    model = ByHeart(lambda step: F.one_hot(script[step], 10).float())
    tokens = torch.stack(list(generate(model, torch.zeros(2, 1, dtype=torch.long), 4, temperature=0)))
    assert torch.equal(tokens, script), 'without end_id a 9 is a token like any other'


def test_generate_builds_no_graph_and_leaves_the_world_as_it_was():
    """No gradients while it runs; between two tokens and afterwards they work as before, and the mode stays."""
    model, graphs = tiny('gpt2', 30), []
    decode = model.decode
    model.decode = lambda *args, **kwargs: graphs.append(torch.is_grad_enabled()) or decode(*args, **kwargs)
    for training in (True, False):
        model.train(training)
        for token in generate(model, torch.zeros(1, 1, dtype=torch.long), 3):
            assert not token.requires_grad and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert model.training == training
    assert graphs == [False] * 6

# -----------------------------------------------------------------------------
# TextStream

BPE = bpe_tokenizer([STORY * 3], 256 + 105 + 60)  # joins some bytes of a character without the others


@given(st.one_of(st.text(), st.text(alphabet=STORY)), st.sampled_from(['byte', 'bpe', 'char']))
@example(STORY, 'byte')
@example(STORY, 'bpe')
@example('\ufeff\ufffd\x00\U0010ffff', 'byte')
def test_a_stream_joins_to_the_whole_text(text, kind):
    """Token by token, and not a character late or too early: after each, all whole characters are out. b15"""
    tokenizer = {'byte': byte_tokenizer(), 'bpe': BPE, 'char': char_tokenizer(set(text) | {'a'})}[kind]
    ids = prepare_data.encode(tokenizer, text).tolist()
    stream, out, data = TextStream(tokenizer), '', b''
    for token in ids:
        out += stream.add(token)
        data += tokenizer.decode_single_token_bytes(token)
        whole = data.decode('utf-8', errors='ignore')                      # valid so far: only a cut tail is left out
        assert out == whole, f'{out!r} after the bytes {data}, not {whole!r}'
    assert stream.end() == '' and out == tokenizer.decode(ids) == text


@given(st.lists(st.binary(min_size=1, max_size=5)))
@example([b'\xe4', b'\xb8', b'a'])
@example([b'\xf0\x9f\x98'])
@example([b'\xed\xa0\x80', b'\xc0\xaf', b'\xf8'])
def test_a_stream_of_any_bytes_joins_to_what_python_reads(pieces):
    """A young model writes bytes that are no text: each gets the sign that decoding them at once would give. b15"""
    data = b''.join(pieces)
    assert streamed(pieces)[0] == data.decode('utf-8', errors='replace')
    ids = list(data)
    stream = TextStream(byte_tokenizer())
    out = ''.join(stream.add(token) for token in ids) + stream.end()
    assert out == byte_tokenizer().decode(ids), f'{out!r} for {data}'


def chunks(data, cuts):
    ends = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in zip(ends, ends[1:])]


@given(st.text(alphabet='ab中', max_size=12), st.text(alphabet='ab中', min_size=1, max_size=4),
       st.lists(st.integers(0, 99), max_size=20))
@example('aab', 'ab', [1, 2])
@example('a中中b', '中b', [2, 5, 6])
@example('ababa', 'abac', [3])
@example('aaab', 'aab', [1, 2, 3])      # "aa" could be two beginnings of the stop: the longer must wait
@settings(max_examples=100)
def test_a_text_ends_right_before_its_stop(text, stop, cuts):
    """However the bytes are cut into tokens, and within a character too. A stop that never ends is text."""
    out, stopped = streamed(chunks(text.encode(), cuts), [stop])
    assert (out, stopped) == (text.partition(stop)[0], stop in text), f'{out!r} of {text!r} with the stop {stop!r}'


@given(st.text(alphabet='ab中', max_size=12), st.lists(st.text(alphabet='ab中', min_size=1, max_size=4), max_size=4),
       st.lists(st.integers(0, 99), max_size=20))
@example('abcd', ['abcd', 'bc'], [])
@settings(max_examples=100)
def test_several_stops_cut_at_one_place_whatever_the_tokens(text, stops, cuts):
    """Stops may overlap each other: where it ends depends on the text alone, not on how it was cut."""
    pieces = chunks(text.encode(), cuts)
    out, stopped = streamed(pieces, stops)
    assert stopped == any(stop in text for stop in stops), f'{stopped} for {text!r} and {stops}'
    if not stopped:
        assert out == text
    else:
        assert any(text[len(out):].startswith(stop) for stop in stops), f'{out!r} of {text!r} ends before none of {stops}'
        assert text.startswith(out) and not any(stop in out for stop in stops), f'{out!r} of {text!r}, stops {stops}'
    by_byte = streamed([bytes([b]) for b in text.encode()], stops)[0]
    assert out == by_byte, f'{text!r}, stops {stops}: {out!r} in the pieces {pieces}, {by_byte!r} byte by byte'


def test_what_may_be_a_stop_waits_and_nothing_else_does():
    """By hand, with the stops "\\n\\n" and "。人": text comes as soon as it can no longer be the beginning of a stop."""
    pieces = ['a\n', 'b', '。', '。', '人之', 'c'] + ['x'] * 2
    stream = TextStream(Pieces([piece.encode() for piece in pieces]), ['\n\n', '。人', ''])
    assert [stream.add(i) for i in range(4)] == ['a', '\nb', '', '。']
    assert not stream.stopped
    assert [stream.add(4), stream.stopped, stream.add(5), stream.end()] == ['', True, '', '']
    stream = TextStream(Pieces([piece.encode() for piece in pieces]), ['\n\n'])
    assert [stream.add(0), stream.end()] == ['a', '\n']                    # half a stop at the end is text
    assert streamed([b'ab', b'\xe4\xb8'], ['b\ufffdx'])[0] == 'ab\ufffd'   # and so is half a character

# -----------------------------------------------------------------------------
# write


@given(st.sampled_from(NAMES), st.sampled_from(['', 'a', '人之', STORY]), st.integers(0, 99))
def test_write_is_the_text_of_what_generate_yields(preset, prompt, seed):
    """For every row: up to the end of the document, which is not text. An empty prompt begins a document."""
    tokenizer = byte_tokenizer()
    end_id = tokenizer._special_tokens['<|endoftext|>']
    model = tiny(preset, 384)
    ids = torch.tensor([list(prompt.encode()) or [end_id]])
    rows = torch.stack(list(generate(model, ids.expand(3, -1), 60, 1.0, seed=seed, end_id=end_id,
                                     forbidden=forbidden_tokens(tokenizer, 384))), dim=1).tolist()
    texts = [''] * 3
    for row, text in write(model, tokenizer, prompt, Settings(temperature=1.0, seed=seed, max_new_tokens=60), rows=3):
        texts[row] += text
    for found, row in zip(texts, rows):
        row = row[:row.index(end_id)] if end_id in row else row
        assert found == bytes(row).decode('utf-8', errors='replace'), f'{found!r} for {row}'


def test_a_stop_ends_one_row_and_not_the_others():
    """Each row up to its own stop; when all have stopped, the model is asked no more."""
    tokenizer = char_tokenizer('abc。')
    script = ['a。bb', 'ba。b', 'cc。。']
    logits = lambda step: F.one_hot(torch.tensor([sorted('abc。').index(row[step]) for row in script]), 120).float()
    model = ByHeart(logits)
    model.config.vocab_size, model.parameters = 120, lambda: iter([torch.zeros(1)])
    texts = [''] * 3
    for row, text in write(model, tokenizer, 'a', Settings(temperature=0, max_new_tokens=4, stop=['。'], seed=0), rows=3):
        texts[row] += text
    assert texts == ['a', 'ba', 'cc'] and len(model.fed) == 3, f'{texts} in {len(model.fed)} steps'


def test_write_names_the_character_it_has_never_seen():
    """A character tokenizer knows its own text only: a ValueError, where tiktoken itself would panic."""
    with pytest.raises(ValueError, match='never seen \'字\''):
        list(write(tiny('gpt2', 120), char_tokenizer('abc'), 'ab字c', Settings(seed=0)))

# -----------------------------------------------------------------------------
# Scores


def slow_loss(model, ids, T):
    """Nats, and how many predictions: every window of T by itself, every logarithm by hand."""
    nats, n = 0.0, 0
    for start in range(0, len(ids) - 1, T):
        window = torch.tensor([int(i) for i in ids[start:start + T + 1]])
        log_p = model(window[None, :-1])[0][0].log_softmax(dim=-1)
        nats -= sum(log_p[t, token].item() for t, token in enumerate(window[1:]))
        n += len(window) - 1
    return nats, n


@given(st.sampled_from(NAMES), st.integers(0, 90), st.integers(0, 8), st.integers(1, 4),
       st.sampled_from([np.uint16, np.uint32, np.int64]))
@example('gpt2', 80, 1, 3, np.uint16)   # more windows than a batch holds
@example('gpt2', 9, 8, 1, np.uint16)    # one window, just whole
@example('lstm', 10, 8, 2, np.uint16)   # and one of a single prediction more
def test_text_loss_is_what_a_slow_loop_finds(preset, n, block_size, world, dtype):
    """Every token but the first is predicted once, the short last window too; the shares of several ranks add up."""
    model, ids = tiny(preset, 30), np.random.default_rng(n).integers(0, 30, n).astype(dtype)
    nats, predictions = text_loss(model, ids, block_size)
    expected, count = slow_loss(model, ids, block_size or 8)
    assert predictions == count == max(0, n - 1), f'{predictions} predictions of {n} tokens'
    assert math.isclose(nats, expected, rel_tol=1e-4, abs_tol=1e-6), f'{nats} nats, not {expected}'
    shares = [text_loss(model, ids, block_size, rank, world) for rank in range(world)]
    assert sum(share[1] for share in shares) == predictions, f'{shares} for {predictions} predictions'
    assert math.isclose(sum(share[0] for share in shares), nats, rel_tol=1e-5, abs_tol=1e-6), f'{shares} for {nats}'


def test_the_windows_of_a_text_are_dealt_to_all_ranks():
    """200 windows and two ranks: neither does the work of both, and each enters the precision it was given."""
    model, ids, entered = tiny('gpt2', 30), np.arange(200) % 30, []

    class Precision:
        def __enter__(self):
            entered.append(torch.is_grad_enabled())

        def __exit__(self, *error):
            pass

    shares = [text_loss(model, ids, 1, rank, 2, Precision)[1] for rank in range(2)]
    assert sum(shares) == 199 and min(shares) >= 60, f'predictions of each rank: {shares}'
    assert entered and not any(entered), f'gradients while scoring: {entered}'


@pytest.mark.parametrize('preset', NAMES)
def test_scoring_has_no_dropout_and_restores_the_mode(preset):
    """A model in training scores as one at rest, twice the same, and is in training afterwards; one at rest rests. b2"""
    model, ids = tiny(preset, 30, dropout=0.5), np.arange(50) % 30
    at_rest = text_loss(model, ids)
    assert not model.training
    model.train()
    scores = [text_loss(model, ids) for _ in range(2)]
    assert scores == [at_rest, at_rest], f'{scores} in training, {at_rest} at rest'
    assert all(module.training for module in model.modules())


def test_scores_by_hand():
    """Three predictions of 1/2, 1/4 and 1/8 are 6 bits: over 4 bytes 1.5 a byte, and as unsure as a die of 4 sides."""
    scores = text_scores(6 * math.log(2), 3, 4)
    assert scores == pytest.approx({'loss': 2 * math.log(2), 'perplexity': 4.0, 'bits_per_byte': 1.5}), scores
    assert text_scores(1e6, 3, 4)['perplexity'] < math.inf
    assert sample.format_scores({'loss': 1.89799, 'perplexity': 6.6712, 'bits_per_byte': 2.73821}) == \
        'loss 1.8980, perplexity 6.67, bits per byte 2.738'


DOCUMENTS = '人之初。\n<|endoftext|>\nTwo.\r\nSecond line\n'


def score_by_hand(model, tokenizer):
    """DOCUMENTS is two documents: each ends in <|endoftext|>, which the model must predict but which has no bytes."""
    first, second, end_id = '人之初。\n', 'Two.\nSecond line\n', tokenizer._special_tokens['<|endoftext|>']
    ids = [*tokenizer.encode(first), end_id, *tokenizer.encode(second), end_id]
    nats, n = slow_loss(model, ids, model.config.block_size)
    return {'loss': nats / n, 'perplexity': math.exp(nats / n),
            'bits_per_byte': nats / math.log(2) / len((first + second).encode())}


@pytest.mark.parametrize('tokenizer', [byte_tokenizer(), BPE], ids=['byte', 'bpe'])
def test_a_scored_file_is_read_as_in_training(tmp_path, tokenizer):
    """Documents, their ends, line ends; bits per byte divides by the bytes of the text, whatever the tokenizer."""
    model, path = tiny('llama', tokenizer.n_vocab), tmp_path / 'text.txt'
    path.write_bytes(DOCUMENTS.encode())
    scores, expected = score_file(model, tokenizer, str(path)), score_by_hand(model, tokenizer)
    assert scores == pytest.approx(expected, rel=1e-4), f'{scores} for {expected}'
    path.write_bytes(b'')
    with pytest.raises(ValueError, match='no text'):
        score_file(model, tokenizer, str(path))

# -----------------------------------------------------------------------------
# The command. Most questions are asked within this process, since starting Python and torch takes seconds.


def talkative(tokenizer):
    """A model that seldom ends a document. In training it would drop half of what it knows; the script must not."""
    model = tiny('llama', tokenizer.n_vocab, 16, dropout=0.5)
    model.output.weight.data *= 2
    model.output.weight.data[tokenizer._special_tokens['<|endoftext|>']] = 0.0
    return model


@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory):
    """A folder with checkpoints: best.pt writes Chinese characters, bytes.pt bytes that are seldom text."""
    folder = tmp_path_factory.mktemp('checkpoints')
    for name, tokenizer in (('best.pt', char_tokenizer(CHARACTERS)), ('bytes.pt', byte_tokenizer())):
        save(folder / name, talkative(tokenizer), tokenizer=tokenizer_to_dict(tokenizer))
    return folder


@pytest.fixture
def ask(checkpoints, monkeypatch, capsys):
    """ask(flags...) -> (exit status, standard output, standard error) of `sample.py flags...` on the CPU."""
    def ask(*flags, stdin=b''):
        monkeypatch.setattr(sys, 'argv', ['sample.py', '--out_dir', str(checkpoints), '--device', 'cpu', *map(str, flags)])
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin), encoding='ascii'))
        with warnings.catch_warnings():  # the user would see warnings as more lines
            warnings.simplefilter('always', UserWarning)
            warnings.showwarning = lambda message, *_: print(f'warning:\n{message}', file=sys.stderr)
            try:
                status = prepare_data.run(sample.main) or 0
            except SystemExit as end:
                status = end.code
        return status, *capsys.readouterr()
    return ask


def is_one_line(answer, *words):
    """The user can mend it: exit status 2, nothing on standard output, one line with these words on standard error."""
    status, out, err = answer
    assert (status, out) == (2, ''), f'exit status {status}, output {out!r}, {err}'
    assert err.startswith('sample.py: error: ') and err.count('\n') == 1 and err.endswith('\n'), f'not one line: {err}'
    assert all(word in err for word in words), f'{err!r} lacks one of {words}'
    return True


@pytest.mark.parametrize('flags, words', [
    (['--temperature', '-1'], ['--temperature -1', 'at least 0']),
    (['--temperature', 'nan'], ['--temperature nan']),
    (['--top_p', '1.5'], ['--top_p 1.5', 'at most 1']),
    (['--top_p=-0.1'], ['--top_p -0.1', 'at least 0']),
    (['--top_k', '-1'], ['--top_k -1', 'at least 0']),
    (['--top_k', '1.5'], ['--top_k', '1.5', 'whole number']),
    (['--num_samples', '0'], ['--num_samples 0', 'at least 1']),
    (['--max_new_tokens', '0'], ['--max_new_tokens 0', 'at least 1']),
    (['--seed', '-2'], ['--seed -2', 'at least -1']),
    (['--temprature', '1'], ['--temprature', '--temperature']),
    (['--device', 'tpu'], ['--device tpu', 'cpu']),
    (['--dtype', 'int3'], ['--dtype int3', 'bfloat16']),
    (['--start', 'ab字c'], ["'字'"]),
    (['--start', 'a\udcff'], ['\\udcff']),                                # what a shell hands over that is no UTF-8
    (['--start', 'FILE:nowhere.txt'], ['nowhere.txt']),
    (['--start', 'FILE:'], []),
    (['--score', 'nowhere.txt'], ['nowhere.txt']),
    (['--out_dir', 'nowhere'], ['nowhere', 'train.py']),
    (['--init_from', 'nowhere.pt'], ['nowhere.pt', 'train.py']),
    (['--init_from', '.'], ['best.pt', 'ckpt.pt', 'train.py']),
], ids=lambda x: x[0] if x else '')
def test_what_the_user_can_mend_is_one_line(ask, tmp_path, monkeypatch, flags, words):
    """Every mistake names itself, and what would be right."""
    monkeypatch.chdir(tmp_path)
    assert is_one_line(ask(*flags), *words)


def test_errors_are_one_line_in_a_process_of_its_own(checkpoints, tmp_path):
    """As above, but with nothing between the user and the script."""
    for flags in (['--top_p', 1.5], ['--out_dir', 'nowhere'], ['--out_dir', checkpoints, '--start', 'ab字c']):
        result = command('sample.py', *flags, cwd=tmp_path, status=2)
        assert is_one_line((2, result.stdout, result.stderr), str(flags[-1])[-1])


@pytest.mark.parametrize('kind', ['empty', 'text', 'cut at 100', 'cut in half', 'last byte lost', 'pickle', 'short pickle',
                                  'no tokenizer', 'no model'])
def test_a_damaged_checkpoint_is_one_line_with_its_name(ask, checkpoints, tmp_path, kind):
    """A copy that was interrupted, another file, another program's file: always the same clear answer."""
    good, path = (checkpoints / 'best.pt').read_bytes(), tmp_path / 'mine.pt'
    if kind in ('no tokenizer', 'no model'):
        save(path, tiny('gpt2', 120))
        if kind == 'no model':
            torch.save({'weights': torch.zeros(3)}, path)
    else:
        path.write_bytes({'empty': b'', 'text': STORY.encode(), 'cut at 100': good[:100],
                          'cut in half': good[:len(good) // 2], 'last byte lost': good[:-1],
                          'pickle': pickle.dumps({'config': {}, 'model': {}}, protocol=4),
                          'short pickle': b'\x80\x02.'}[kind])
    assert is_one_line(ask('--init_from', path), 'mine.pt')


def test_the_prompt_comes_from_a_text_a_file_or_standard_input(ask, tmp_path):
    """The three ways give the same bytes, with a byte order mark or without; the prompt stands before the text."""
    prompt, same = '性相近，\nabc é😀', ['--seed', 1, '--max_new_tokens', 20]
    for name, mark in (('plain.txt', b''), ('marked.txt', b'\xef\xbb\xbf')):
        (tmp_path / name).write_bytes(mark + prompt.encode())
    answers = [ask('--start', prompt, *same), ask('--start', '-', *same, stdin=prompt.encode()),
               *(ask('--start', f'FILE:{tmp_path / name}', *same) for name in ('plain.txt', 'marked.txt'))]
    assert [status for status, _, _ in answers] == [0] * 4, answers
    assert len({out for _, out, _ in answers}) == 1, f'{[out for _, out, _ in answers]}'
    assert answers[0][1].startswith(prompt) and len(answers[0][1]) > len(prompt) + 5, answers[0][1]


def test_line_ends_of_a_prompt_are_those_of_the_training_text(ask, tmp_path):
    """Windows ends a line in two characters. Training text never has them, so neither has a prompt."""
    (tmp_path / 'windows.txt').write_bytes(b'a\r\nb\r\n')
    expected = ask('--start', 'a\nb\n', '--seed', 1)
    assert ask('--start', f'FILE:{tmp_path / "windows.txt"}', '--seed', 1)[:2] == expected[:2]
    assert ask('--start', '-', '--seed', 1, stdin=b'a\r\nb\r\n')[:2] == expected[:2]


@pytest.mark.parametrize('data, offset', [(b'ab\xffc', 2), ('人'.encode() + b'\xe4\xb8', 3), (b'\xef\xbb\xbfab\xff', 5)])
def test_a_prompt_that_is_no_utf8_names_the_offset(ask, tmp_path, data, offset):
    """Counted in bytes from the start of the file, so an editor can go there; a byte order mark is part of the file."""
    (tmp_path / 'bad.txt').write_bytes(data)
    assert is_one_line(ask('--start', f'FILE:{tmp_path / "bad.txt"}'), 'bad.txt', 'UTF-8', f'offset {offset} ')
    assert is_one_line(ask('--start', '-', stdin=data), 'standard input', 'UTF-8', f'offset {offset} ')


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(ask):
    """Without a seed, every run is new."""
    runs = [ask('--start', '人', '--seed', seed, '--max_new_tokens', 40)[1] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] and runs[0] != runs[2], runs
    assert len({ask('--start', '人', '--temperature', 5)[1] for _ in range(3)}) == 3


@pytest.mark.parametrize('flags', [[], ['--num_samples', 3], ['--num_samples', 2, '--stop', '。', 'b'],
                                   ['--start', '', '--num_samples', 2], ['--start', '性', '--top_k', 4, '--top_p', 0.9],
                                   ['--temperature', 0]], ids=str)
@pytest.mark.parametrize('name', ['best.pt', 'bytes.pt'])
def test_a_stream_writes_the_same_text(ask, checkpoints, name, flags):
    """--stream changes when text appears, never which."""
    flags = ['--init_from', checkpoints / name, '--seed', 3, '--max_new_tokens', 50, *flags]
    whole, stream = ask(*flags), ask(*flags, '--stream')
    assert whole[0] == stream[0] == 0 and len(whole[1]) > 10, whole
    assert whole[1] == stream[1], f'{whole[1]!r} at once, {stream[1]!r} as a stream'


def test_standard_output_holds_the_text_alone_and_standard_error_the_speed(ask, checkpoints):
    """Three samples are told apart by lines of three dashes, and N counts the tokens (here: characters) of all."""
    status, out, err = ask('--start', 'ab', '--num_samples', 3, '--seed', 1, '--max_new_tokens', 30)
    texts = out.removesuffix('\n').split('\n---\n')
    assert status == 0 and len(texts) == 3 == len(set(texts)), out
    assert all(text.startswith('ab') and set(text) <= CHARACTERS for text in texts), texts
    speed = re.fullmatch(r'(\d+) tokens in \d+\.\d+ s \(\d+\.\d tok/s\)\n', err)
    assert speed and int(speed[1]) == sum(len(text) - 2 for text in texts), f'{err!r} for {texts}'
    for flags in ([], ['--stream'], ['--json']):  # and bytes are tokens, also where several make one character
        status, out, err = ask('--init_from', checkpoints / 'bytes.pt', '--num_samples', 2, '--seed', 2,
                               '--max_new_tokens', 25, *flags)
        assert status == 0 and err.startswith('50 tokens in '), f'{err!r} for {out!r}'


def test_the_first_sample_is_the_same_however_many_there_are(ask):
    """--num_samples 3 begins with what --num_samples 1 writes."""
    one, three = (ask('--start', '人', '--seed', 1, '--num_samples', n)[1] for n in (1, 3))
    assert three.startswith(one + '---\n'), f'{one!r}, but {three!r}'


def test_json_lines_hold_prompt_and_text(ask):
    """One object a sample; joined they are what is printed without --json, and Chinese stays readable."""
    flags = ['--start', '人之\n', '--num_samples', 3, '--seed', 1, '--max_new_tokens', 30]
    plain, lines, stream = ask(*flags)[1], ask(*flags, '--json')[1], ask(*flags, '--json', '--stream')[1]
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [sorted(row) for row in rows] == [['prompt', 'text']] * 3 and '人之' in lines, lines
    assert '\n---\n'.join(row['prompt'] + row['text'] for row in rows) + '\n' == plain
    assert lines == stream, f'{lines!r} at once, {stream!r} as a stream'


def test_a_stop_is_not_printed(ask):
    """Chinese stops too: the text is the one without --stop, cut before the first of them."""
    flags = ['--start', '人', '--seed', 1, '--max_new_tokens', 60]
    whole = ask(*flags)[1][1:-1]
    stops = [whole[14:16], whole[9:11]]
    assert len(whole) > 16 and len(set(stops)) == 2, whole
    cut = ask(*flags, '--stop', *stops)[1][1:-1]
    assert cut == whole[:min(whole.find(stop) for stop in stops)], f'{cut!r} of {whole!r}, stops {stops}'


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('preset', NAMES)
def test_every_preset_writes_and_scores_in_every_precision(ask, tmp_path, monkeypatch, preset, dtype):
    """The weights really have that precision, and loss in half of it is close to loss in whole."""
    tokenizer, seen = char_tokenizer(CHARACTERS), []
    save(tmp_path / 'ckpt.pt', tiny(preset, tokenizer.n_vocab, 16), tokenizer=tokenizer_to_dict(tokenizer))
    print_texts = sample.print_texts
    monkeypatch.setattr(sample, 'print_texts', lambda model, *rest: seen.append(next(model.parameters()).dtype)
                        or print_texts(model, *rest))
    flags = ['--out_dir', tmp_path, '--dtype', dtype]
    status, out, err = ask(*flags, '--start', VERSE, '--seed', 1, '--max_new_tokens', 20)
    assert status == 0 and out.startswith(VERSE) and seen == [getattr(torch, dtype)], f'{status}, {out}, {err}, {seen}'
    (tmp_path / 'text.txt').write_text(VERSE, encoding='utf-8')
    loss = json.loads(ask(*flags, '--score', tmp_path / 'text.txt', '--json')[1])['loss']
    exact = score_file(tiny(preset, tokenizer.n_vocab, 16), tokenizer, str(tmp_path / 'text.txt'))['loss']
    assert loss == pytest.approx(exact, rel=1e-6 if dtype == 'float32' else 0.05), f'{loss} in {dtype}, exactly {exact}'


def test_score_prints_loss_perplexity_and_bits_per_byte(ask, checkpoints, tmp_path):
    """Equal to the hand computation; --json is one object with these three keys, and the prompt is not asked for."""
    (tmp_path / 'text.txt').write_bytes(DOCUMENTS.encode())
    flags = ['--init_from', checkpoints / 'bytes.pt', '--score', tmp_path / 'text.txt', '--start', 'FILE:nowhere']
    tokenizer = byte_tokenizer()
    expected = score_by_hand(talkative(tokenizer), tokenizer)
    status, out, err = ask(*flags)
    numbers = re.fullmatch(r'loss (\S+), perplexity (\S+), bits per byte (\S+)\n', out)
    assert status == 0 and numbers and err == '', f'{status}: {out}{err}'
    assert [float(x) for x in numbers.groups()] == pytest.approx(list(expected.values()), rel=1e-3), f'{out} for {expected}'
    scores = json.loads(ask(*flags, '--json')[1])
    assert list(scores) == ['loss', 'perplexity', 'bits_per_byte']
    assert scores == pytest.approx(expected, rel=1e-4), f'{scores} for {expected}'


def test_a_machine_without_a_gpu_says_so(ask, monkeypatch):
    """--device cuda and --device mps are one line where there is none; auto takes the CPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    for name in ('cuda', 'mps'):
        assert is_one_line(ask('--device', name), f'--device {name}', 'auto')
    assert ask('--device', 'auto', '--seed', 1)[0] == 0


def test_no_flag_vanishes_unnoticed(ask):
    """--help shows every flag that people have in their scripts, on standard output."""
    status, out, err = ask('--help')
    flags = {'start', 'out_dir', 'init_from', 'num_samples', 'max_new_tokens', 'temperature', 'top_k', 'top_p', 'stop',
             'seed', 'stream', 'score', 'json', 'device', 'dtype'}
    assert status == 0 and err == '' and flags <= set(re.findall(r'--(\w+)', out)), out


def test_output_is_utf8_on_any_console(checkpoints, tmp_path):
    """PYTHONIOENCODING=ascii, as an old console would have it: Chinese goes in by a pipe and comes out whole."""
    environment = os.environ | {'PYTHONIOENCODING': 'ascii'}
    result = command('sample.py', '--out_dir', checkpoints, '--start', '-', '--temperature', 0, '--device', 'cpu',
                     '--max_new_tokens', 10, cwd=tmp_path, env=environment, input='性本善')
    tokenizer = char_tokenizer(CHARACTERS)
    model = talkative(tokenizer)
    text = ''.join(text for _, text in write(model, tokenizer, '性本善', Settings(temperature=0, max_new_tokens=10, seed=0)))
    assert result.stdout == f'性本善{text}\n', f'{result.stdout!r} is not {text!r}'
    assert set(text) & set(VERSE), f'the model should write Chinese, not {text!r}'


@pytest.mark.parametrize('flags, n', [([], 0), ([], 10), (['--stream'], 10)], ids=str)
def test_a_reader_who_leaves_early_meets_no_traceback(checkpoints, tmp_path, flags, n):
    """`sample.py | head -c 10`, and a reader who is gone before the first byte."""
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'}
    words = [ROOT / 'sample.py', '--init_from', checkpoints / 'bytes.pt', '--seed', '3', '--max_new_tokens', '300', *flags]
    with subprocess.Popen([sys.executable, *map(str, words)], cwd=tmp_path, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        got = process.stdout.read(n)
        process.stdout.close()
        err = process.stderr.read().decode()
    assert len(got) == n and 'Error' not in err and err.count('\n') <= 1, err
    assert process.returncode == 0, f'exit status {process.returncode}: {err}'


def test_importing_the_sampler_brings_nothing_that_only_others_need(tmp_path):
    """No plots, no tests, no launchers, no compiler: the first word should come soon."""
    heavy = ['matplotlib', 'transformers', 'pytest', 'hypothesis', 'safetensors', 'tokenizers', 'train', 'sklearn', 'pandas',
             'torch.distributed.run', 'torch.distributed.launcher', 'torch.distributed.elastic', 'torch._dynamo',
             'torch._inductor', 'torch.utils.tensorboard']
    code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import sample; print(*sorted(set(sys.modules) & set({heavy!r})))'
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, encoding='utf-8')
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, '', ''), result
