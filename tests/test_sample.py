"""
sample.py: which token is chosen, how a text goes on, when bytes become characters, what the models answer that do not
write, what a score is, and the command.

Models here are tiny and random, with weights wide enough that no two logits come close to each other. Where a model would
only blur the question, one that knows its answers by heart (`ByHeart`) takes its place. Scores are compared with seqeval,
scikit-learn, sacrebleu, rouge_score, and the published definition of SQuAD's, written out here. What beams find is compared
with trying everything.
"""

import collections
import copy
import dataclasses
import html.parser
import io
import itertools
import json
import math
import os
import pickle
import re
import string
import subprocess
import sys
import warnings

import huggingface_hub
import numpy as np
import pytest
import sacrebleu
import torch
from conftest import ROOT, command
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F

import model as model_py
import prepare_data
import sample
from model import IGNORE, PRESETS, build, save
from prepare_data import bpe_tokenizer, byte_tokenizer, char_tokenizer, encode, encode_rows, tokenizer_to_dict
from sample import (
    Settings,
    TextStream,
    beam_search,
    choose,
    forbidden_tokens,
    generate,
    score_file,
    text_loss,
    text_scores,
    write,
    write_beams,
    write_targets,
)

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

    def decode(self, ids, keep=None, cache=None):
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
    """Row 0 says 9 (the end) third, row 1 first: row 1 is asked no more, and nothing comes after both."""
    script = torch.tensor([[1, 9], [2, 5], [9, 6], [3, 7]])
    model = ByHeart(lambda step: F.one_hot(script[step, :1 if step else 2], 10).float())
    tokens = torch.stack(list(generate(model, torch.zeros(2, 1, dtype=torch.long), 4, temperature=0, end_id=9)))
    assert tokens.tolist() == [[1, 9], [2, 9], [9, 9]] and len(model.fed) == 3, f'{tokens}, {len(model.fed)} steps'
    model = ByHeart(lambda step: F.one_hot(script[step], 10).float())
    tokens = torch.stack(list(generate(model, torch.zeros(2, 1, dtype=torch.long), 4, temperature=0)))
    assert torch.equal(tokens, script), 'without end_id a 9 is a token like any other'


def test_a_row_that_has_ended_costs_nothing_more():
    """Rows leave the batch where they end: the model reads 3, 3, 2, 1 of them, and what they hold leaves with them."""
    held, steps = [], [[1, 2, 3], [4, 9, 5], [9, 6], [9]]                  # row 1 ends second, row 0 third, row 2 fourth

    class Holds:
        config = dataclasses.replace(PRESETS['gpt2'], block_size=8)

        def decode(self, ids, keep=None, cache=None):
            cache['seen'] = torch.cat([cache['seen'], ids], dim=1) if 'seen' in cache else ids
            held.append(cache['seen'].tolist())
            return F.one_hot(torch.tensor(steps[len(held) - 1]), 10).float()

    tokens = torch.stack(list(generate(Holds(), torch.tensor([[7], [8], [0]]), 9, temperature=0, end_id=9)))
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 5], [9, 9, 6], [9, 9, 9]], tokens
    assert held == [[[7], [8], [0]], [[7, 1], [8, 2], [0, 3]], [[7, 1, 4], [0, 3, 5]], [[0, 3, 5, 6]]], held


@pytest.mark.parametrize('preset', [*NAMES, 'transformer', 't5'])
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=5), temperature=st.sampled_from([0.0, 1.5]),
       seed=st.integers(0, 99))
def test_where_a_neighbour_ends_changes_nothing(preset, lengths, temperature, seed):
    """Prompts padded on the left, or sources padded: each row goes on as it does alone, while others leave at any time."""
    # b10, b11
    model, rng, n = tiny(preset, 5, 24, seed), np.random.default_rng(seed), max(lengths)
    keep = torch.tensor([[False] * (n - length) + [True] * length for length in lengths])
    ids = torch.from_numpy(rng.integers(5, size=keep.shape))

    def go_on(ids, keep, first_row):
        how = dict(temperature=temperature, seed=seed, first_row=first_row, end_id=0)
        if not hasattr(model, 'read'):
            return list(generate(model, ids, 12, keep=keep, **how))
        with torch.inference_mode():
            cache = model.read(ids, keep)
        return list(generate(model, torch.ones(len(ids), 1, dtype=torch.long), 12, cache=cache, **how))

    together = torch.stack(go_on(ids, keep, 0), dim=1).tolist()
    for i, found in enumerate(together):
        alone = [int(t) for t in go_on(ids[i:i + 1, keep[i]], None, i)]
        assert found == alone + [0] * (len(found) - len(alone)), f'row {i} of {lengths}: {found}, alone {alone}'
    assert len(together[0]) == 12 or max(row.index(0) for row in together) == len(together[0]) - 1, together


@pytest.mark.parametrize('preset', NAMES)
@settings(max_examples=8)
@given(prompt=st.integers(1, 9), block_size=st.integers(1, 6), seed=st.integers(0, 99))
def test_rows_end_before_and_after_the_window_is_full(preset, prompt, block_size, seed):
    """Where the older half is forgotten, what is read again is that of the rows that still go on."""
    # b10
    model, how = tiny(preset, 6, block_size, seed), dict(temperature=2.0, seed=seed, end_id=0)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(6, size=(5, prompt)))
    together = torch.stack(list(generate(model, ids, 25, **how)), dim=1).tolist()
    for i, found in enumerate(together):
        alone = [int(t) for t in generate(model, ids[i:i + 1], 25, first_row=i, **how)]
        assert found == alone + [0] * (len(found) - len(alone)), f'row {i}: {found}, alone {alone}'


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
# Answers of the models that do not write: batches

TASK_LABELS = {'': [], 'classify': ['bad', '好', 'x y'], 'tag': ['O', 'B-per-son', 'I-per-son', 'B-地', 'I-地'], 'qa': []}


def some_examples(task, lengths, seed=0):
    """Random ids below 30 as examples of a task, with targets; `about` says which is which."""
    draw, made = np.random.default_rng(seed), []
    for i, n in enumerate(lengths):
        targets = {'classify': int(draw.integers(3)), 'qa': draw.integers(n, size=2).tolist(),
                   'tag': [int(t) if t < 5 else IGNORE for t in draw.integers(8, size=n)]}
        made.append({'ids': draw.integers(30, size=n).tolist(), 'segments': sorted(draw.integers(2, size=n).tolist()),
                     'about': {'i': i}} | ({'targets': targets[task]} if task else {}))
    return made


def alone(model, example, **more):
    """What a model says to one example, asked without neighbours: (logits as numpy, loss)."""
    batch = {key: torch.tensor(value)[None] for key, value in example.items() if key in ('ids', 'segments', 'targets')}
    with torch.no_grad():
        logits, loss = model(**batch, **more)
    return logits[0].numpy(), loss


@given(st.sampled_from(['', 'classify', 'tag', 'qa']), st.lists(st.integers(1, 9), min_size=1, max_size=6))
@example('tag', [3, 3, 3])
def test_a_batch_is_padded_on_the_right_and_says_what_is_real(task, lengths):
    """Ids with the padding token, targets with "not asked"; `about` stays behind; nothing moves. b3"""
    examples = some_examples(task, lengths)
    batch, T = sample.collate(examples, 77), max(lengths)
    assert set(batch) - {'keep'} == set(examples[0]) - {'about'}, set(batch)
    keep = batch.get('keep', torch.ones(len(lengths), T, dtype=torch.bool))
    assert keep.dtype == torch.bool and keep.tolist() == [[t < n for t in range(T)] for n in lengths], keep
    assert 'keep' in batch or len(set(lengths)) == 1
    for key, fill in (('ids', 77), ('segments', 0), ('targets', IGNORE)):
        for found, made in zip(batch.get(key, []), examples):
            row = made[key]
            expected = row if task in ('classify', 'qa') and key == 'targets' else row + [fill] * (T - len(row))
            assert found.dtype == torch.int64 and found.tolist() == expected, f'{key}: {found} for {row}'


@given(st.sampled_from(['', 'classify', 'tag', 'qa']), st.sampled_from(['bert', 'gpt2', 'llama', 'lstm']),
       st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 9), st.randoms(use_true_random=False))
@example('qa', 'bert', [12, 1, 5], 2, None)
@settings(max_examples=40)
def test_padding_and_neighbours_change_no_answer(task, preset, lengths, rows, shuffle):
    """However many are asked at once and in whatever order: each gets what it gets alone, and losses add up. b2 b3"""
    model = tiny(preset if task else 'bert', 30, 12, task=task, n_labels=len(TASK_LABELS[task]), dropout=0.5)
    examples, asked, nats = some_examples(task, lengths), 0, 0.0
    if shuffle:
        shuffle.shuffle(examples)
    model.train()
    taken, found_nats, found_asked = sample.ask(model, examples, 29, lambda e, logits: (e, logits), rows)
    assert model.training and all(module.training for module in model.modules()), 'the mode was not restored'
    model.eval()
    for made, (same, logits) in zip(examples, taken, strict=True):
        expected, loss = alone(model, made, counts={'targets': 1})
        asked += int((np.array(made.get('targets', IGNORE)) != IGNORE).sum())
        nats += loss.item() if loss is not None else 0.0
        n = len(made['ids'])
        logits = logits[:, :n] if task == 'qa' else logits if task == 'classify' else logits[:n]
        assert same is made and logits.dtype == np.float32, f'{same} in the place of {made}'
        assert np.allclose(logits, expected, rtol=1e-3, atol=1e-3), f'off by {np.abs(logits - expected).max()}'
    assert found_asked == asked and math.isclose(found_nats, nats, rel_tol=1e-3, abs_tol=1e-3), f'{found_nats}, not {nats}'


def test_half_precision_is_read_as_float32():
    """numpy has no bfloat16; the answers come all the same, close to the exact ones."""
    model, examples = tiny('bert', 30, 12, task='classify', n_labels=3), some_examples('classify', [3, 9])
    exact = sample.ask(model, examples, 29)[0]
    half = sample.ask(model.to(torch.bfloat16), examples, 29)[0]
    assert half[0].dtype == np.float32 and np.allclose(half, exact, atol=0.3), f'{half} for {exact}'

# -----------------------------------------------------------------------------
# Answers: labels, tags, spans


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=5, unique=True))
@example([1e38, -1e38, 0.0])
def test_the_label_is_the_likeliest_and_says_how_likely(logits):
    """Probabilities of all labels, in their order, by hand in float64; no logit is too large."""
    labels = [f'第{i}' for i in range(len(logits))]
    found = sample.read_label([{}], [np.array(logits, np.float32)], labels)
    p = (torch.tensor(logits, dtype=torch.float32).double()).softmax(dim=0).tolist()
    assert p[labels.index(found['label'])] == pytest.approx(max(p), abs=1e-6), f'{found} for {p}'
    assert found['probability'] == pytest.approx(max(p), abs=1e-5), f'{found} for {p}'
    assert list(found['probabilities']) == labels
    assert list(found['probabilities'].values()) == pytest.approx(p, abs=1e-5), f'{found} for {p}'


KINDS = ['x', 'y', '人', 'per-son', 'per', '-', 'B-x', 'O', '_']
TAGS = st.sampled_from(['O', 'O', *(prefix + kind for kind in KINDS for prefix in ('B-', 'I-'))])


@pytest.mark.parametrize('tags, expected', [
    ('', []), ('O', []), ('B-x', [('x', 0, 1)]), ('B-x I-x', [('x', 0, 2)]), ('B-x B-x', [('x', 0, 1), ('x', 1, 2)]),
    ('O I-x I-x O', [('x', 1, 3)]), ('B-x I-y', [('x', 0, 1), ('y', 1, 2)]), ('I-x B-x I-x', [('x', 0, 1), ('x', 1, 3)]),
    ('B-x O I-x', [('x', 0, 1), ('x', 2, 3)]), ('B-per-son I-per', [('per-son', 0, 1), ('per', 1, 2)]),
    ('I-人 I-人 B-地', [('人', 0, 2), ('地', 2, 3)]),
], ids=str)
def test_entities_by_hand(tags, expected):
    """An I-kind that continues nothing of its kind begins an entity."""
    assert sample.entities(tags.split()) == expected, sample.entities(tags.split())


@given(st.lists(TAGS, max_size=12))
@settings(max_examples=300)
def test_entities_are_those_of_seqeval(tags):
    """Also where tags are ill-formed, kinds have dashes, or are Chinese. seqeval's ends are included."""
    found = sample.entities(tags)
    assert found == [(kind, first, last + 1) for kind, first, last in get_entities(tags)], f'{found} of {tags}'


@given(st.lists(st.lists(st.tuples(TAGS, TAGS), max_size=6), min_size=1, max_size=5), st.integers(1, 4))
@example([[('O', 'O')]], 1)                       # nothing there, nothing found
@example([[('B-x', 'O')], [('I-x', 'I-x')]], 1)   # an entity ends where its text ends
@settings(max_examples=200)
@pytest.mark.filterwarnings('ignore::sklearn.exceptions.UndefinedMetricWarning')
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_entity_scores_are_those_of_seqeval(rows, size):
    """Its default mode, over all texts together; a long text comes in parts, and an entity may lie across the cut."""
    rights, guesses = ([[pair[k] for pair in row] for row in rows] for k in (0, 1))
    golds = [[{'about': {'tags': tags[i:i + size]}} for i in range(0, len(tags), size)] for tags in rights]
    found = sample.entity_scores([{'tags': tags} for tags in guesses], golds)
    expected = {'precision': precision_score(rights, guesses), 'recall': recall_score(rights, guesses),
                'f1': entity_f1(rights, guesses)}
    assert found == pytest.approx(expected, abs=1e-12), f'{found}, not {expected}'
    assert list(found) == list(expected)


@given(st.lists(st.tuples(*[st.sampled_from(['好', 'bad', 'O', 'x y', ''])] * 2), min_size=1, max_size=12))
@example([('好', 'bad'), ('好', '好')])            # one label never right, one that nobody has
@settings(max_examples=200)
def test_label_scores_are_those_of_scikit_learn(pairs):
    """Macro F1 averages over the labels that are there or are guessed; a label never met brings 0."""
    right, guessed = zip(*pairs)
    found = sample.label_scores([{'label': g} for g in guessed], [[{'about': {'label': r}}] for r in right])
    expected = {'accuracy': accuracy_score(right, guessed),
                'macro_f1': f1_score(right, guessed, average='macro', zero_division=0)}
    assert found == pytest.approx(expected, abs=1e-12), f'{found}, not {expected} for {pairs}'
    assert list(found) == list(expected)


def squad_words(text):
    """normalize_answer and get_tokens of SQuAD's evaluate-v2.0.py; then each Chinese or Japanese character is a word."""
    text = ''.join(c for c in text.lower() if c not in set(string.punctuation))
    text = ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())
    return re.findall('[\u3041-\u3096\u30a1-\u30fa\u3400-\u9fff]|[^\\s\u3041-\u3096\u30a1-\u30fa\u3400-\u9fff]+', text)


def squad_score(answer, rights):
    """compute_exact and compute_f1 of evaluate-v2.0.py against the best of the right answers; none is ''."""
    rights = [squad_words(right) for right in rights if squad_words(right)] or [[]]
    words, overlaps = squad_words(answer), []
    for right in rights:
        same = sum((collections.Counter(words) & collections.Counter(right)).values())
        if not words or not right:
            overlaps.append(float(words == right))
        elif same == 0:
            overlaps.append(0.0)
        else:
            precision, recall = same / len(words), same / len(right)
            overlaps.append(2 * precision * recall / (precision + recall))
    return float(words in rights), max(overlaps)


PIECES = ['the', 'a', 'an', 'The', 'cat', 'Cats', 'cat!', 'U.S.', "'s", '-', '北京', '大学', '。', 'こん', 'カナ', '😀',
          'e\u0301', '한국', 'cat的', '3', ' ', ' ', '\n', '\u3000', '']
PHRASES = st.lists(st.sampled_from(PIECES), max_size=7).map(''.join)


@given(st.lists(st.tuples(PHRASES, st.lists(PHRASES.filter(squad_words), max_size=3)), min_size=1, max_size=4))
@example([('the cat', ['Cat.']), ('', []), ('x', []), ('', ['x'])])
@settings(max_examples=300)
def test_answer_scores_are_those_of_squad(rows):
    """No case, punctuation or articles, the best of several right answers, the mean over questions."""
    golds = [[{'about': {'answers': rights}}] for _, rights in rows]
    found = sample.answer_scores([{'answer': text} for text, _ in rows], golds)
    exact, overlap = np.mean([squad_score(text, rights) for text, rights in rows], axis=0)
    assert found == pytest.approx({'exact_match': exact, 'f1': overlap}, abs=1e-12), f'{found}, not {exact}, {overlap}'
    assert list(found) == ['exact_match', 'f1']


@pytest.mark.parametrize('text, rights, exact, overlap', [
    ('The Eiffel Tower!', ['eiffel  tower'], 1, 1), ('a tower', ['Eiffel tower'], 0, 2 / 3), ('dog', ['cat'], 0, 0),
    ('北京大学', ['北京'], 0, 2 / 3), ('京北', ['北京'], 0, 1), ('in 北京', ['北京', 'London'], 0, 0.8),
    ('cat cat', ['cat'], 0, 2 / 3),
    ('', [], 1, 1), ('cat', [], 0, 0), ('', ['cat'], 0, 0), ('another', ['other'], 0, 0), ('theory', ['ory'], 0, 0),
    ('b c', ['x', 'b', 'b c d'], 0, 0.8),
], ids=str)
def test_answer_scores_by_hand(text, rights, exact, overlap):
    """Each Chinese character is a word; articles go only where they are words."""
    found = sample.answer_scores([{'answer': text}], [[{'about': {'answers': rights}}]])
    assert found == pytest.approx({'exact_match': exact, 'f1': overlap}), f'{found} for {text!r} and {rights}'
    assert squad_score(text, rights) == pytest.approx((exact, overlap)), 'the definition written out above is wrong'


def test_a_right_answer_without_words_does_not_count_beside_others():
    """SQuAD's script drops right answers of which nothing is left ("The"), unless all are such."""
    for text, rights in (('', ['The', 'cat']), ('a', ['!', '北京']), ('', ['the', 'a']), ('...', ['!'])):
        found = sample.answer_scores([{'answer': text}], [[{'about': {'answers': rights}}]])
        exact, overlap = squad_score(text, rights)
        assert found == pytest.approx({'exact_match': exact, 'f1': overlap}), f'{found} for {text!r} and {rights}'


def kind_of_tokenizer(kind, text):
    return {'byte': byte_tokenizer(), 'bpe': BPE, 'char': char_tokenizer(set(text) | {'?'})}[kind]


@given(st.one_of(st.text(alphabet='ab 中😀é.\n', max_size=90), st.text(alphabet=STORY, min_size=40, max_size=90)),
       st.sampled_from(['byte', 'bpe', 'char']), st.sampled_from([12, 24, 80]), st.booleans(),
       st.sampled_from([-3.0, 0.0, 3.0, 6.0]), st.integers(0, 99))
@example('x' * 75, 'byte', 80, False, 0.0, 3)
@example('', 'byte', 24, False, 0.0, 0)
@settings(max_examples=150)
def test_a_span_is_the_best_of_all_spans(context, kind, block_size, unanswerable, boost, seed):
    """
    Every window, beginning and end tried one by one: it never ends before it begins, has at most 30 tokens, and is cut
    from the original text. [CLS] wins only where the training data had questions without an answer.
    """
    draw, labels = np.random.default_rng(seed), ['no answer'] if unanswerable else []
    examples = encode_rows(kind_of_tokenizer(kind, context), 'qa', [{'question': '?', 'context': context}], labels,
                           block_size)
    T, logits, spans, nothing = max(len(e['ids']) for e in examples) + 2, [], [(-1.0, '')], []
    for made in examples:
        n, about = len(made['ids']), made['about']
        row = draw.normal(size=(2, T)).astype(np.float32) * 4
        row[:, 0] += boost
        row[:, n:] = torch.finfo(torch.float32).min                        # padding, as TaskModel marks it
        p, first = torch.from_numpy(row).softmax(dim=1).double().numpy(), about['first']
        nothing.append(p[0, 0] * p[1, 0])
        last = n - 2                                                       # before it stands the [SEP] of the context
        for begin in range(first, last + 1):
            for end in range(begin, min(begin + 30, last + 1)):
                low, high = about['offsets'][begin - first][0], about['offsets'][end - first][1]
                spans.append((p[0, begin] * p[1, end], context[about['start'] + low:about['start'] + high].strip()))
        logits.append(row)
    p, text = max(spans)
    found = sample.read_span(examples, logits, labels)
    if not text and context:  # white space is the best: see the next test
        return
    if not context or (unanswerable and min(nothing) > p):
        p, text = min(nothing), ''
    assert found['answer'] == text, f'{found}, not {text!r} with {p}; [CLS] has {nothing}'
    assert found['probability'] == pytest.approx(p, rel=1e-3), f'{found}, not {p}'
    if text:
        assert context[found['start']:found['start'] + len(text)] == text, f'{found} does not stand there in {context!r}'


def test_white_space_is_no_answer():
    """Nor is it the way to say that there is none: that is for models that learned to. The best span of words is taken."""
    [made] = encode_rows(byte_tokenizer(), 'qa', [{'question': '?', 'context': '8   9'}], [], 24)
    logits, first = np.zeros((2, len(made['ids'])), np.float32), made['about']['first']
    logits[0, first + 2] = logits[1, first + 3] = 9                        # two spaces
    logits[1, first + 4] = 5
    found = sample.read_span([made], [logits], [])
    assert found['answer'] == '9' and found['start'] == 4, f'{found}'


def test_a_span_has_at_most_30_tokens():
    """The best beginning and the best end lie 30 tokens apart, both included: taken. One more: not."""
    for tokens, length in ((30, 30), (31, 1)):
        [made] = encode_rows(byte_tokenizer(), 'qa', [{'question': '?', 'context': 'x' * 60}], [], 80)
        logits = np.zeros((2, len(made['ids'])), np.float32)
        logits[0, made['about']['first'] + 4] = logits[1, made['about']['first'] + 4 + tokens - 1] = 20
        logits[1, made['about']['first'] + 4] = 10
        found = sample.read_span([made], [logits], [])
        assert found['start'] == 4 and len(found['answer']) == length, f'{found} for {tokens} tokens'


ANY_TEXT = st.text(alphabet='ab 中😀é👍🏽e\u0301.', min_size=1, max_size=30).filter(str.strip)


@given(st.sampled_from(['classify', 'tag', 'qa']), st.sampled_from(['bert', 'llama']),
       st.lists(ANY_TEXT, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_row_gets_the_answer_that_it_gets_alone(task, preset, texts, shuffle):
    """From texts to answers, in whatever company, also where a long text is several examples. b3"""
    tokenizer, labels = byte_tokenizer(), TASK_LABELS[task]
    model = tiny(preset, 384, 24, task=task, n_labels=len(labels), dropout=0.5)
    rows = [{'classify': {'text': text, 'text_b': '中'}, 'tag': {'tokens': text.split()},
             'qa': {'question': '?', 'context': text}}[task] for text in texts]
    pad_id = tokenizer._special_tokens['[PAD]']
    several = lambda rows: sample.answer(model, encode_rows(tokenizer, task, rows, labels, 24), task, labels, pad_id)
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    answers, parts, loss = several([rows[i] for i in order])
    assert loss is None and [part[0]['about']['row'] for part in parts] == list(range(len(rows)))
    for i, found in zip(order, answers, strict=True):
        [expected], _, _ = several([rows[i]])
        for key in expected:
            close = pytest.approx(expected[key], abs=1e-3) if key.startswith('prob') else expected[key]
            assert found[key] == close, f'{key} of {rows[i]}: {found} in company, {expected} alone'
        if task == 'tag':
            assert found['tokens'] == rows[i]['tokens'] and len(found['tags']) == len(found['tokens']), found
            assert set(found['tags']) <= set(labels)


def test_a_tag_is_that_of_the_first_piece_and_entities_cross_the_cut():
    """Two examples of one text; the other pieces of a token say something else, and nobody listens."""
    labels = TASK_LABELS['tag']
    parts = encode_rows(byte_tokenizer(), 'tag', [{'tokens': ['人民', 'b', 'cd', '😀', 'e']}], labels, 13)
    assert len(parts) == 2, f'{len(parts)} examples'
    tags, logits = iter(['O', 'B-per-son', 'I-per-son', 'I-per-son', 'I-地']), []
    for part in parts:
        row = np.zeros((len(part['ids']) + 3, len(labels)), np.float32)
        row[:, 3] = 5                                                      # B-地 for every piece that is not asked
        for t in part['about']['where']:
            row[t] = 0
            row[t, labels.index(next(tags))] = 1
        logits.append(row)
    found = sample.read_tags(parts, logits, labels)
    assert found['tokens'] == ['人民', 'b', 'cd', '😀', 'e']
    assert found['tags'] == ['O', 'B-per-son', 'I-per-son', 'I-per-son', 'I-地'], found
    assert found['entities'] == [{'kind': 'per-son', 'text': 'b cd 😀', 'first': 1, 'last': 3},
                                 {'kind': '地', 'text': 'e', 'first': 4, 'last': 4}], found

# -----------------------------------------------------------------------------
# Answers: hidden tokens

WORDS = 'the cat sat on the mat and the dog sat on the cat . '
WORD_BPE = bpe_tokenizer([WORDS * 4], 256 + 105 + 40)


@given(st.lists(st.sampled_from(['the', 'cat', 'sat', 'mat', 'dog']), min_size=1, max_size=6), st.data())
@settings(max_examples=50)
def test_a_mask_takes_the_place_of_the_token_that_was_there(words, data):
    """
    Where tokens carry the space before them, the space before [MASK] is hidden with the word: the ids are those of the
    whole text with that token replaced. Where a space is a token of its own, it stays.
    """
    hidden = data.draw(st.sets(st.integers(0, len(words) - 1), min_size=1))
    text = ' '.join('[MASK]' if i in hidden else word for i, word in enumerate(words))
    special = WORD_BPE._special_tokens
    each = [encode(WORD_BPE, ' ' * (i > 0) + word).tolist() for i, word in enumerate(words)]
    ids = [t for i, tokens in enumerate(each) for t in ([special['[MASK]']] if i in hidden else tokens)]
    assert all(len(tokens) == 1 for tokens in each[1:]), 'these words should be one token each'
    assert [t for tokens in each for t in tokens] == encode(WORD_BPE, ' '.join(words)).tolist()
    found = sample.masked_text(WORD_BPE, text, 99)
    assert found['ids'] == [special['[CLS]'], *ids, special['[SEP]']], f'{found["ids"]} for {text!r}'
    assert found['segments'] == [0] * len(found['ids'])
    two = sample.masked_text(WORD_BPE, 'the  [MASK]  cat', 99)['ids']      # of two spaces, one is a token of its own
    assert two[1:-1] == [*encode(WORD_BPE, 'the '), special['[MASK]'], *encode(WORD_BPE, '  cat')], two
    letters = char_tokenizer(set(WORDS))
    special = letters._special_tokens
    ids = [t for i, part in enumerate(text.split('[MASK]'))
           for t in [special['[MASK]']] * (i > 0) + [sorted(set(WORDS)).index(c) for c in part]]
    found = sample.masked_text(letters, text, 99)
    assert found['ids'] == [special['[CLS]'], *ids, special['[SEP]']], f'{found["ids"]} for {text!r}'


def test_masks_stand_in_two_texts_too():
    """`a ||| b`: the second text is of segment 1; spaces around the bars are nobody's."""
    tokenizer = byte_tokenizer()
    cls, sep, mask = (tokenizer._special_tokens[name] for name in ('[CLS]', '[SEP]', '[MASK]'))
    found = sample.masked_text(tokenizer, 'a [MASK]  |||  [MASK][MASK]中', 99)
    assert found['ids'] == [cls, 97, 32, mask, sep, mask, mask, *'中'.encode(), sep], found['ids']
    assert found['segments'] == [0] * 5 + [1] * 6
    for text in ('a', '[mask]', '', 'a ||| b'):
        with pytest.raises(ValueError, match=re.escape('[MASK]')):
            sample.masked_text(tokenizer, text, 99)
    sample.masked_text(tokenizer, 'abc[MASK]', 6)
    with pytest.raises(ValueError, match=r'7 tokens.*block_size=6'):
        sample.masked_text(tokenizer, 'abcd[MASK]', 6)


@given(st.sampled_from(['byte', 'bpe', 'char']), st.integers(1, 12), st.integers(0, 5), st.integers(0, 99))
def test_guesses_are_text_and_never_special_tokens(kind, k, extra, seed):
    """The k likeliest of the tokens that are text, best first; their probabilities share what the others lose."""
    tokenizer = kind_of_tokenizer(kind, STORY)
    made = sample.masked_text(tokenizer, 'a [MASK] 初[MASK]', 99)
    logits = np.random.default_rng(seed).normal(size=(len(made['ids']), tokenizer.n_vocab + extra)).astype(np.float32) * 3
    n = len(tokenizer._mergeable_ranks)
    logits[:, n:] += 20                                                    # special tokens and rows of no token tempt
    found = sample.read_masks(tokenizer, made, logits, k)
    where = [t for t, i in enumerate(made['ids']) if i == tokenizer._special_tokens['[MASK]']]
    assert len(found) == len(where) == 2
    for guesses, t in zip(found, where):
        p = torch.from_numpy(logits[t, :n]).double().softmax(dim=0)
        best, ids = p.topk(k)
        assert [x for _, x in guesses] == pytest.approx(best.tolist(), rel=1e-4), f'{guesses} for {best}'
        texts = [tokenizer.decode([i]) for i in ids.tolist()]
        assert [text.strip() for text, _ in guesses] == [text.strip() for text in texts], f'{guesses} for {texts}'


@pytest.mark.parametrize('kind', ['byte', 'char'])
def test_whoever_asks_for_all_guesses_still_gets_no_special_token(kind):
    """--top_k 1000 of a vocabulary of a few hundred: as many guesses as there are tokens that are text."""
    tokenizer = kind_of_tokenizer(kind, STORY)
    made, n = sample.masked_text(tokenizer, '[MASK]', 99), len(tokenizer._mergeable_ranks)
    for extra in (0, 3):
        [found] = sample.read_masks(tokenizer, made, np.zeros((3, tokenizer.n_vocab + extra), np.float32), 1000)
        assert len(found) == n and all(p > 0 for _, p in found), f'{len(found)} guesses, {n} tokens: {found[-3:]}'
        assert not {text for text, _ in found} & set(tokenizer._special_tokens), found[-3:]


def test_masks_are_read_from_texts_of_unequal_length():
    """In a batch the shorter has padding; its guesses are those that it gets alone. b3"""
    tokenizer = kind_of_tokenizer('char', STORY)
    model, pad_id = tiny('bert', tokenizer.n_vocab + 3, 24), tokenizer._special_tokens['[PAD]']
    examples = [sample.masked_text(tokenizer, text, 24) for text in ('人[MASK]初', 'Once [MASK]pon [MASK] time', '[MASK]')]
    read = lambda e, logits: sample.read_masks(tokenizer, e, logits, 4)
    together, expected = sample.ask(model, examples, pad_id, read)[0], [read(e, alone(model, e)[0]) for e in examples]
    for found, right in zip(together, expected, strict=True):
        assert [[text for text, _ in mask] for mask in found] == [[text for text, _ in mask] for mask in right]
        assert np.allclose([[p for _, p in mask] for mask in found], [[p for _, p in mask] for mask in right], atol=1e-4)


def hide_one_at_a_time(model, tokenizer, ids):
    """Is each token guessed, and its -log P, by a loop: every one hidden by itself in its own window, nothing padded."""
    cls, sep, mask = (tokenizer._special_tokens[name] for name in ('[CLS]', '[SEP]', '[MASK]'))
    right, nats, room = [], [], model.config.block_size - 2
    for start in range(0, len(ids), room):
        window = [int(i) for i in ids[start:start + room]]
        for at, token in enumerate(window):
            row = torch.tensor([[cls, *window[:at], mask, *window[at + 1:], sep]])
            log_p = model(row, segments=torch.zeros_like(row))[0][0, at + 1].log_softmax(dim=0)
            right.append(bool(log_p.argmax() == token))
            nats.append(-log_p[token].item())
    return right, nats


@given(st.integers(1, 25), st.integers(3, 9), st.integers(0, 99), st.booleans())
@example(12, 8, 0, False)                        # two windows, both just full
@example(13, 8, 0, True)                         # and one more, of a single token
@settings(max_examples=15)
def test_hidden_scores_are_what_a_slow_loop_finds(n, block_size, seed, train):
    """Hide one token, see all others of its window: the share guessed, and exp of the mean of -log P. b2"""
    tokenizer = char_tokenizer('abcdef')
    model = tiny('bert', tokenizer.n_vocab, block_size, seed, dropout=0.5)
    model.output.bias.data[:6] += 6                                        # else no letter is ever right
    ids = np.random.default_rng(seed).integers(0, 6, n).astype(np.uint16)
    right, nats = hide_one_at_a_time(model, tokenizer, ids)
    model.train(train)
    found = sample.hidden_scores(model, tokenizer, ids)
    assert model.training == train and list(found) == ['masked_accuracy', 'pseudo_perplexity']
    assert found['masked_accuracy'] == pytest.approx(np.mean(right)), f'{found}, but right are {right}'
    assert found['pseudo_perplexity'] == pytest.approx(math.exp(np.mean(nats)), rel=2e-3), f'{found} for {nats}'


def test_of_a_long_text_some_tokens_are_hidden_from_its_beginning_to_its_end():
    """Five of 40, with a model that is right about the second half alone: some of each half are asked."""
    tokenizer = char_tokenizer('ab')
    model = tiny('bert', tokenizer.n_vocab, 8)
    for p in (model.output.weight, model.output.bias):
        torch.nn.init.zeros_(p)
    model.output.bias.data[1] = 5                                          # it always says b
    found = sample.hidden_scores(model, tokenizer, np.array([0] * 20 + [1] * 20), positions=5)
    assert found['masked_accuracy'] in (0.4, 0.6), f'{found}: not five tokens, evenly spread'
    assert sample.hidden_scores(model, tokenizer, np.array([1] * 40), positions=5)['masked_accuracy'] == 1

# -----------------------------------------------------------------------------
# From a line to a row, from an answer to a line


@given(st.one_of(st.text(), st.text(alphabet='ab 中か\u3099😀👍🏽e\u0301.,@#-\'"')))
@example('Angela Merkel spoke, e\u0301 @user #1 中国人 3.14 x中y (U.S.) "ok"…')
def test_cutting_a_line_into_tokens_loses_nothing(line):
    """A line for the tagger: white space separates tokens, every other character is in one, in order."""
    tokens = sample.read_line('tag', line)['tokens']
    assert all(tokens) and not any(re.search(r'[ \n\t]', token) for token in tokens), tokens
    assert ''.join(''.join(tokens).split()) == ''.join(line.split()), f'{tokens} of {line!r}'


@pytest.mark.parametrize('line, tokens', [
    ('Angela Merkel spoke.', ['Angela', 'Merkel', 'spoke', '.']), ('北京 is big', ['北', '京', 'is', 'big']),
    ('(e\u0301!)', ['(', 'e\u0301', '!', ')']), ('@user', ['@user']), ('   ', []), ('a ||| b', ['a', '|', '|', '|', 'b']),
], ids=str)
def test_tokens_of_a_line_by_hand(line, tokens):
    """Punctuation at the edge of a word and each Chinese character are tokens; a combining mark stays with its letter."""
    assert sample.read_line('tag', line)['tokens'] == tokens, sample.read_line('tag', line)


def test_pairs_are_read_by_hand():
    """One text or two; a question needs its context; three are an error."""
    assert sample.read_line('classify', ' a  b ') == {'text': 'a  b'}
    assert sample.read_line('classify', 'a|||中 ') == {'text': 'a', 'text_b': '中'}
    assert sample.read_line('qa', 'who? ||| The dog.') == {'question': 'who?', 'context': 'The dog.'}
    for task, line in (('classify', 'a ||| b ||| c'), ('qa', 'a'), ('qa', 'a ||| b ||| c')):
        with pytest.raises(ValueError, match=re.escape('|||')):
            sample.read_line(task, line)


@pytest.mark.parametrize('found', [lambda text: {'label': text, 'probability': 0.5},
                                   lambda text: {'guesses': [[(text, 0.5), ('b', 0.1)], [(text, 0.25)]]},
                                   lambda text: {'answer': text, 'probability': 0.5}], ids=['label', 'guesses', 'answer'])
@pytest.mark.parametrize('text', ['a', '中文', '\n', 'a\nb', '\r\n', '\r', ''], ids=repr)
def test_an_answer_is_one_line_whatever_it_says(found, text):
    """A character model guesses line ends, a span may hold one, a label of a JSONL file may too."""
    line = sample.show(found(text))
    assert '\n' not in line and '\r' not in line, f'{line!r} is not one line'
    assert text.strip() not in ('a', '中文') or text in line, f'{line!r} does not say {text!r}'


def test_answers_look_like_this():
    """By hand: what a reader of standard output sees."""
    assert sample.show({'label': '好', 'probability': 0.51239, 'probabilities': {}}) == '好 0.5124'
    assert sample.show({'guesses': [[('import', 0.5), ('if', 0.25)], [('中', 0.125)]]}) == \
        'import 0.500, if 0.250 | 中 0.125'
    assert sample.show({'answer': 'The\n dog', 'probability': 0.5, 'start': 3}) == 'The dog'
    tagged = {'tokens': ['Ann', 'spoke'], 'tags': ['B-人', 'O'],
              'entities': [{'kind': '人', 'text': 'Ann', 'first': 0, 'last': 0}]}
    assert sample.show(tagged) == 'Ann/B-人 spoke/O\t人: Ann'
    assert sample.show({'tokens': ['a'], 'tags': ['O'], 'entities': []}) == 'a/O'
    assert sample.format_scores({'exact_match': 0.5, 'f1': 2 / 3}) == 'exact match 0.5000, f1 0.6667'
    assert sample.format_scores({'masked_accuracy': 0.25, 'pseudo_perplexity': 12.345}) == \
        'masked accuracy 0.2500, pseudo perplexity 12.35'

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
             'seed', 'stream', 'score', 'json', 'device', 'dtype', 'num_beams', 'length_penalty', 'export'}
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


@pytest.mark.parametrize('name', ['best.pt', 'bytes.pt'])
def test_beams_print_the_likeliest_texts_best_first(ask, checkpoints, name):
    """--num_samples of them, told apart as samples are; --json has a score beside prompt and text; a stop cuts; no seed."""
    flags = ['--init_from', checkpoints / name, '--start', '人之', '--num_beams', 4, '--max_new_tokens', 7]
    status, out, err = ask(*flags, '--num_samples', 3)
    rows = [json.loads(line) for line in ask(*flags, '--num_samples', 3, '--json', '--seed', 5)[1].splitlines()]
    scores = [row['score'] for row in rows]
    assert status == 0 and [list(row) for row in rows] == [['prompt', 'text', 'score']] * 3, (out, err, rows)
    assert scores == sorted(scores, reverse=True) and scores[0] < 0 and len({row['text'] for row in rows}) == 3, rows
    assert '\n---\n'.join(row['prompt'] + row['text'] for row in rows) + '\n' == out
    assert ask(*flags)[1] == out.split('\n---\n')[0] + '\n', 'one is asked for: the best'
    assert ask(*flags, '--temperature', 0, '--stream')[1] == ask(*flags)[1], 'neither draws'
    best = rows[0]['text']
    assert ask(*flags, '--stop', best[2:4])[1] == '人之' + best[:best.find(best[2:4])] + '\n'
    assert ask(*flags, '--length_penalty', 0, '--num_samples', 4, '--json')[1].count('\n') == 4
    empty = json.loads(ask(*flags, '--start', '', '--json')[1])
    assert empty['prompt'] == '' and empty['text'], empty


@pytest.mark.parametrize('flags, words', [
    (['--num_beams', 3, '--temperature', 0.5], ['--num_beams 3', '--temperature', 'leave one']),
    (['--num_beams', 3, '--top_k', 5], ['--num_beams 3', '--top_k']),
    (['--num_beams', 3, '--top_p', 0.9], ['--num_beams 3', '--top_p']),
    (['--num_beams', 3, '--top_p', 0], ['--num_beams 3', '--top_p']),
    (['--num_beams', 3, '--num_samples', 4], ['--num_samples 4', '--num_beams 3'])], ids=str)
def test_a_search_and_a_draw_exclude_each_other(ask, flags, words):
    """One line, before anything is loaded; without beams the same flags are fine."""
    assert is_one_line(ask('--start', '人', '--max_new_tokens', 3, *flags), *words)
    assert ask('--start', '人', '--max_new_tokens', 3, *flags[2:])[0] == 0


@pytest.mark.parametrize('flags', [['--start', '人'], ['--start', '人', '--out_dir', 'gpt2'], ['--score', 'a.txt'],
                                   ['--export', 'there', '--out_dir', 'google/flan-t5-small']], ids=str)
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_network(ask, tmp_path, monkeypatch, flags):
    """out_dir is a folder, whatever it is called: one line. Only --init_from may be a name on the hub."""
    asked, nothing = [], str(tmp_path / 'nothing')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *args, **more: asked.append(args) or nothing)
    monkeypatch.chdir(tmp_path)
    folder = flags[-1] if '--out_dir' in flags else 'out'
    flags = flags if '--out_dir' in flags else [*flags, '--out_dir', 'out']
    assert is_one_line(ask(*flags), f'there is no folder {folder}: ', 'train.py') and asked == [], asked
    assert os.listdir(tmp_path) == []
    assert is_one_line(ask('--init_from', 'gpt2')) and asked == [('gpt2',)], asked

# -----------------------------------------------------------------------------
# The command, where the model does not write: a line in, a line out

ANSWERERS = {  # name: preset, task, labels
    'mlm': ('bert', '', []), 'classify': ('bert', 'classify', TASK_LABELS['classify']),
    'classify-llama': ('llama', 'classify', TASK_LABELS['classify']), 'tag': ('bert', 'tag', TASK_LABELS['tag']),
    'tag-gpt2': ('gpt2', 'tag', TASK_LABELS['tag']), 'qa': ('bert', 'qa', []), 'qa-none': ('bert', 'qa', ['no answer']),
}
NO_LINE_ENDS = CHARACTERS - {'\n'}


def answerer(name):
    """(model, tokenizer, labels): bytes for all tasks; characters, and three rows of no token, for the hidden ones."""
    preset, task, labels = ANSWERERS[name]
    tokenizer = byte_tokenizer() if task else char_tokenizer(NO_LINE_ENDS)
    model = tiny(preset, tokenizer.n_vocab + 3, 40, seed=2, task=task, n_labels=len(labels), dropout=0.5)
    return model, tokenizer, labels


@pytest.fixture(scope='session')
def answerers(tmp_path_factory):
    """A folder with a checkpoint for every name of ANSWERERS, as train.py leaves them."""
    folder = tmp_path_factory.mktemp('answerers')
    for name in ANSWERERS:
        model, tokenizer, labels = answerer(name)
        save(folder / f'{name}.pt', model, tokenizer=tokenizer_to_dict(tokenizer), task=ANSWERERS[name][1], labels=labels)
    return folder


LINES = {
    '': ['人[MASK]初', 'a [MASK]bc [MASK]', '[MASK]', 'ab ||| é[MASK]😀', '性本善[MASK]性相近习相远 abc abc'],
    'classify': ['a good film', '不好', 'x ||| 😀 e\u0301', 'a', 'much longer than the forty tokens that it sees at once'],
    'tag': ['Angela Merkel spoke.', '安 民', '😀', 'one two three four five six seven eight nine ten eleven', 'a'],
    'qa': ['Who? ||| The dog won.', '谁？ ||| 北京的小狗 😀 赢了。', 'x ||| ' + 'many words 和 汉字, ' * 5 + '.',
           '? ||| a', '? ||| 8 9'],
}


@pytest.mark.parametrize('name', ANSWERERS)
def test_a_line_in_is_a_line_out_in_order(ask, answerers, tmp_path, name):
    """
    Blank lines too, from a file, standard input or the flag; company changes nothing; --json agrees. 151 lines are more
    than a batch holds.
    """
    lines = LINES[ANSWERERS[name][1]]
    each = [ask('--init_from', answerers / f'{name}.pt', '--start', line) for line in lines]
    assert all(status == 0 and out.count('\n') == 1 for status, out, _ in each), each
    assert len({out for _, out, _ in each}) > 1, 'a model that always says the same would pass'
    many = ['', *lines * 30, '', '  ', lines[0], '']
    expected = ''.join(dict(zip(lines, (out for _, out, _ in each))).get(line, '\n') for line in many)
    (tmp_path / 'lines.txt').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join([*many, '']).encode())
    text = '\n'.join([*many, ''])
    for start, stdin in ((f'FILE:{tmp_path / "lines.txt"}', b''), ('-', text.encode()), (text, b'')):
        status, out, err = ask('--init_from', answerers / f'{name}.pt', '--start', start, stdin=stdin)
        assert status == 0 and out == expected, f'{start[:9]}: {out[:300]!r}, not {expected[:300]!r}; {err}'
        assert err.startswith('151 ') and err.count('\n') == 1, err
    status, out, _ = ask('--init_from', answerers / f'{name}.pt', '--start', '\n'.join(many[:12]), '--json')
    rows = [json.loads(line) if line else None for line in out.removesuffix('\n').split('\n')]
    assert status == 0 and [row and row['text'] for row in rows] == [line or None for line in many[:12]], out
    assert not any(ord(c) > 127 for line in many[:12] for c in line) or not out.isascii(), 'Chinese should stay readable'
    shown = ''.join((sample.show({k: v for k, v in row.items() if k != 'text'}) if row else '') + '\n' for row in rows)
    assert shown == ''.join(expected.splitlines(keepends=True)[:12]), f'{shown!r} as JSON, without: {expected[:300]!r}'


@pytest.mark.parametrize('name', ['classify', 'tag', 'qa'])
def test_a_line_ends_where_an_editor_says_so(ask, answerers, name):
    """Form feeds, U+0085 and U+2028 are characters of a line, as in prepare_data.py: `wc -l` counts the same in and out."""
    line = 'who ||| a {} b' if name == 'qa' else 'a {} b'
    for sign in ('\x0c', '\x0b', '\x1c', '\x85', '\u2028'):
        text = line.format(sign) + '\n' + line
        status, out, err = ask('--init_from', answerers / f'{name}.pt', '--start', text, '--json')
        assert status == 0 and out.count('\n') == 2, f'{sign!r}: {out!r} {err}'


@pytest.mark.parametrize('name', ['classify', 'classify-llama'])
def test_a_classifier_prints_label_and_probability(ask, answerers, name):
    """What the model says to `[CLS] a [SEP] b [SEP]`, built by hand; all labels as JSON."""
    model, tokenizer, labels = answerer(name)
    cls, sep = (tokenizer._special_tokens[text] for text in ('[CLS]', '[SEP]'))
    for line, texts in (('好 film', ['好 film']), ('a ||| 😀', ['a', '😀']), ('é' * 40, ['é' * 19])):
        ids, segments = [cls], [0]
        for i, text in enumerate(texts):
            ids += [*text.encode(), sep]
            segments += [i] * (len(text.encode()) + 1)
        p = torch.from_numpy(alone(model, {'ids': ids[:40], 'segments': segments[:40]})[0]).softmax(dim=0).tolist()
        label = labels[p.index(max(p))]
        _, out, _ = ask('--init_from', answerers / f'{name}.pt', '--start', line)
        found, _, probability = out.rstrip('\n').rpartition(' ')
        assert found == label and float(probability) == pytest.approx(max(p), abs=2e-4), f'{out!r}: {labels} have {p}'
        row = json.loads(ask('--init_from', answerers / f'{name}.pt', '--start', line, '--json')[1])
        assert row['label'] == label and row['probability'] == pytest.approx(max(p), abs=1e-4), f'{row} for {p}'


def test_a_tagger_prints_tokens_tags_and_entities(ask, answerers):
    """What the model says at the first byte of each token, by hand; an entity is cut out of the tokens."""
    model, tokenizer, labels = answerer('tag')
    cls, sep = (tokenizer._special_tokens[text] for text in ('[CLS]', '[SEP]'))
    ids = [cls, *'安 Merkel 😀 . a'.encode(), sep]
    said = alone(model, {'ids': ids})[0].argmax(axis=1)
    tags = [labels[said[at]] for at in (1, 5, 12, 17, 19)]                 # 安 and its space are 4 bytes, 😀 and its are 5
    row = json.loads(ask('--init_from', answerers / 'tag.pt', '--start', '安 Merkel  😀. a', '--json')[1])
    assert row['tokens'] == ['安', 'Merkel', '😀', '.', 'a'] and row['tags'] == tags, f'{row}, not {tags}'
    expected = [(kind, first, last) for kind, first, last in get_entities(tags)]
    assert [(e['kind'], e['first'], e['last']) for e in row['entities']] == expected, f'{row}, not {expected}'
    assert [e['text'] for e in row['entities']] == [' '.join(row['tokens'][i:j + 1]) for _, i, j in expected]


@pytest.mark.parametrize('name', ['qa', 'qa-none'])
def test_a_question_answerer_prints_what_stands_in_the_context(ask, answerers, name):
    """Chinese and emoji are never cut in half; only where it learned to may it answer nothing."""
    silent = 0
    contexts = ['The dog won.', '北京的小狗😀赢了', 'e\u0301 👍🏽 ' * 4, '汉字 and more, ' * 9, 'x', '1,2,3']
    for i, context in enumerate(contexts):
        line = f'谁 {i}? ||| {context}'
        row = json.loads(ask('--init_from', answerers / f'{name}.pt', '--start', line, '--json')[1])
        _, out, _ = ask('--init_from', answerers / f'{name}.pt', '--start', line)
        assert out == ' '.join(row['answer'].split()) + '\n', f'{out!r} for {row}'
        silent += not row['answer']
        assert row['answer'] == context.strip()[row.get('start', 0):][:len(row['answer'])], f'{row} of {context!r}'
        assert '\ufffd' not in out and 0 < row['probability'] <= 1
    assert bool(silent) == (name == 'qa-none'), f'{silent} times no answer'


def test_the_guesses_for_masks_are_the_likeliest_characters(ask, answerers):
    """What the model says at each [MASK] among characters alone, by hand: five guesses, or --top_k of them."""
    model, tokenizer, _ = answerer('mlm')
    alphabet, special = sorted(NO_LINE_ENDS), tokenizer._special_tokens
    ids = [special['[CLS]'], alphabet.index('人'), special['[MASK]'], alphabet.index(' '), special['[MASK]'],
           special['[SEP]']]
    logits = torch.from_numpy(alone(model, {'ids': ids, 'segments': [0] * 6})[0])
    for flags, k in (([], 5), (['--top_k', 2], 2)):
        lines = []
        for t in (2, 4):
            p = logits[t, :len(alphabet)].softmax(dim=0)
            lines.append(', '.join(f'{alphabet[i]} {p[i]:.3f}' for i in p.topk(k).indices.tolist()))
        status, out, err = ask('--init_from', answerers / 'mlm.pt', '--start', '人[MASK] [MASK]', *flags)
        assert status == 0 and out == ' | '.join(lines) + '\n', f'{out!r}, not {lines}; {err}'


@pytest.mark.parametrize('name, start, words', [
    ('mlm', 'abc', ["'abc'", '[MASK]']),
    ('mlm', 'a[MASK]\n\nabc\na[MASK]', ['line 3', '[MASK]']),
    ('mlm', 'a ||| [MASK] ||| b', ['|||']),
    ('mlm', 'a[MASK]' + 'b' * 40, ['44 tokens', 'block_size=40']),
    ('mlm', 'a[MASK]\n字[MASK]', ['line 2', "'字'"]),
    ('classify', 'a ||| b ||| c', ['|||']),
    ('classify', 'a\nb ||| c ||| d', ['line 2', '|||']),
    ('qa', 'Who won?', ["'Who won?'", 'question ||| context']),
    ('qa', 'a ||| b ||| c', ['question ||| context']),
    ('qa', 'a ||| b\n\n\nwho', ['line 4', '|||']),
    *((name, start, ['--start', 'empty']) for name in ANSWERERS for start in ('', ' \n\n\t')),
], ids=str)
def test_a_line_that_cannot_be_answered_is_one_line_with_its_number(ask, answerers, name, start, words):
    """Before the first answer is printed: nothing but the complaint, and what would be right."""
    assert is_one_line(ask('--init_from', answerers / f'{name}.pt', '--start', start), *words)
    assert is_one_line(ask('--init_from', answerers / f'{name}.pt', '--start', '-', stdin=start.encode()), *words)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('name', ANSWERERS)
def test_every_task_answers_in_half_precision(ask, answerers, name, dtype):
    """numpy and the padding's lowest number both exist there."""
    lines = LINES[ANSWERERS[name][1]][:1] * 2 + ['[MASK]' if name == 'mlm' else 'a ||| b']
    status, out, err = ask('--init_from', answerers / f'{name}.pt', '--dtype', dtype, '--start', '\n'.join(lines))
    assert status == 0 and out.count('\n') == 3 and 'nan' not in out, f'{out}{err}'


# what --score reads, for each task: name of the file, its text
QUESTIONS = {'version': 'v2.0', 'data': [{'paragraphs': [
    {'context': '北京的小狗 😀 won the race.', 'qas': [
        {'id': 'q1', 'question': '谁?', 'answers': [{'text': '小狗', 'answer_start': 3}, {'text': '狗', 'answer_start': 4}]},
        {'id': 'q2', 'question': 'What?', 'answers': [{'text': 'the race', 'answer_start': 12}]},
        {'id': 'q3', 'question': 'Why?', 'answers': [], 'is_impossible': True}]},
    {'context': 'one two three four five six seven eight nine ten, 十一 十二', 'qas': [
        {'id': 'q4', 'question': 'After ten?', 'answers': [{'text': '十一', 'answer_start': 50}]}]}]}]}
TAGGED = '安\tB-per-son\nMerkel\tI-per-son\n.\tO\n\n' + 'in\tO\nBerlin\tB-地\n' * 8 + '\n'


def test_scores_of_a_classifier_are_those_of_scikit_learn(ask, answerers, tmp_path):
    """A file as prepare_data.py reads it: tabs or JSONL, the same scores."""
    labels = TASK_LABELS['classify']
    texts = ['a good film', '不好', '😀', 'x y z', 'b', 'cc', 'ddd', '中文 text']
    right = [labels[i % 2] for i in range(len(texts))]                     # the third is never right, but may be guessed
    (tmp_path / 'a.tsv').write_text(''.join(f'{r}\t{t}\n' for r, t in zip(right, texts)), encoding='utf-8')
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'label': r, 'text': t}) + '\n' for r, t in zip(right, texts)))
    flags = ['--init_from', answerers / 'classify-llama.pt']
    guessed = [json.loads(row)['label'] for row in ask(*flags, '--start', '\n'.join(texts), '--json')[1].splitlines()]
    expected = {'accuracy': accuracy_score(right, guessed),
                'macro_f1': f1_score(right, guessed, average='macro', zero_division=0)}
    assert len(set(guessed)) > 1, guessed
    for name in ('a.tsv', 'a.jsonl'):
        found = json.loads(ask(*flags, '--score', tmp_path / name, '--json')[1])
        assert list(found) == list(expected) and found == pytest.approx(expected), f'{found}, not {expected}'
    status, out, err = ask(*flags, '--score', tmp_path / 'a.tsv')
    assert (status, out, err) == (0, 'accuracy {accuracy:.4f}, macro f1 {macro_f1:.4f}\n'.format(**expected), '')


def test_scores_of_a_tagger_are_those_of_seqeval(ask, answerers, tmp_path):
    """The second text is longer than the model sees at once."""
    (tmp_path / 'tags.conll').write_text(TAGGED, encoding='utf-8')
    model, tokenizer, labels = answerer('tag')
    texts = [[line.split('\t') for line in text.splitlines()] for text in TAGGED.strip().split('\n\n')]
    rights, guesses = [[tag for _, tag in text] for text in texts], []
    for text in texts:
        rows = encode_rows(tokenizer, 'tag', [{'tokens': [token for token, _ in text]}], labels, 40)
        said = [(row, alone(model, row)[0].argmax(axis=1)) for row in rows]
        guesses.append([labels[tags[t]] for row, tags in said for t in row['about']['where']])
    assert len(rows) > 1
    expected = {'precision': precision_score(rights, guesses), 'recall': recall_score(rights, guesses),
                'f1': entity_f1(rights, guesses)}
    flags = ['--init_from', answerers / 'tag.pt', '--score', tmp_path / 'tags.conll']
    found = json.loads(ask(*flags, '--json')[1])
    assert list(found) == list(expected) and found == pytest.approx(expected), f'{found}, not {expected} for {guesses}'
    assert ask(*flags)[:2] == (0, 'precision {precision:.4f}, recall {recall:.4f}, f1 {f1:.4f}\n'.format(**expected))


@pytest.mark.parametrize('name', ['qa', 'qa-none'])
def test_scores_of_a_question_answerer_are_those_of_squad(ask, answerers, tmp_path, name):
    """Of the answers that it prints, also for a context of several windows and a question without an answer."""
    (tmp_path / 'squad.json').write_text(json.dumps(QUESTIONS, ensure_ascii=False, indent=1), encoding='utf-8')
    flags, scores = ['--init_from', answerers / f'{name}.pt'], []
    for paragraph in QUESTIONS['data'][0]['paragraphs']:
        for question in paragraph['qas']:
            line = f"{question['question']} ||| {paragraph['context']}"
            text = json.loads(ask(*flags, '--start', line, '--json')[1])['answer']
            scores.append(squad_score(text, [a['text'] for a in question['answers']]))
    exact, overlap = np.mean(scores, axis=0)
    found = json.loads(ask(*flags, '--score', tmp_path / 'squad.json', '--json')[1])
    assert list(found) == ['exact_match', 'f1'] and found == pytest.approx({'exact_match': exact, 'f1': overlap}), \
        f'{found}, not {exact}, {overlap}: {scores}'
    assert ask(*flags, '--score', tmp_path / 'squad.json')[1] == f'exact match {exact:.4f}, f1 {overlap:.4f}\n'


class Pointer(torch.nn.Module):
    """A question answerer by heart: an answer begins at a token of `begin`, ends at one of `end`, whatever is asked."""

    def __init__(self, vocab_size, begin, end):
        super().__init__()
        self.said = torch.nn.Parameter(torch.zeros(vocab_size, 2))
        self.said.data[begin, 0] = self.said.data[end, 1] = 9.0
        self.config = dataclasses.replace(PRESETS['bert'], task='qa', block_size=32, vocab_size=vocab_size)

    def forward(self, ids, segments=None, keep=None, targets=None, counts=None):
        return self.said[ids].transpose(1, 2), None if targets is None else self.said.sum()


def test_a_score_is_that_of_the_answers_to_questions_whose_answers_are_unknown(tmp_path):
    """The right answer lies inside of a token, so nobody who does not know it can cut it out: no help with that either."""
    context, right = 'the dog and the cat sat on', 'at'
    assert b' cat' in WORD_BPE._mergeable_ranks, 'the answer should lie inside of a token'
    cut = encode(WORD_BPE, right).tolist()
    model = Pointer(WORD_BPE.n_vocab, cut[0], cut[-1])
    question = {'id': 'q', 'question': '?', 'answers': [{'text': right, 'answer_start': context.index(right)}]}
    (tmp_path / 'squad.json').write_text(json.dumps({'data': [{'paragraphs': [{'context': context, 'qas': [question]}]}]}))
    rows = encode_rows(WORD_BPE, 'qa', [{'question': '?', 'context': context}], [], 32)
    [found], _, _ = sample.answer(model, rows, 'qa', [], WORD_BPE._special_tokens['[PAD]'])
    scores, expected = score_file(model, WORD_BPE, str(tmp_path / 'squad.json'), 'qa'), squad_score(found['answer'], [right])
    assert (scores['exact_match'], scores['f1']) == pytest.approx(expected), f'{scores}, but it answers {found}'


def test_scores_of_bert_are_accuracy_and_pseudo_perplexity(ask, answerers, tmp_path):
    """Of the text without the ends of its documents, against the slow loop."""
    model, tokenizer, _ = answerer('mlm')
    texts = ['人之初', *[' abc', '性本善'] * 9, 'é😀']
    (tmp_path / 'texts.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    right, nats = hide_one_at_a_time(model, tokenizer, encode(tokenizer, ''.join(texts)))
    flags = ['--init_from', answerers / 'mlm.pt', '--score', tmp_path / 'texts.jsonl']
    found = json.loads(ask(*flags, '--json')[1])
    assert list(found) == ['masked_accuracy', 'pseudo_perplexity']
    expected = {'masked_accuracy': np.mean(right), 'pseudo_perplexity': math.exp(np.mean(nats))}
    assert found == pytest.approx(expected, rel=1e-2), f'{found}, not {expected}'
    status, out, err = ask(*flags)
    assert status == 0 and err == '' and re.fullmatch(r'masked accuracy 0\.\d{4}, pseudo perplexity \d+\.\d\d\n', out), out


@pytest.mark.parametrize('name, file, text, words', [
    ('classify', 'a.tsv', '好\ta\nbad\n', ['line 2', 'label<TAB>text']),
    ('classify', 'a.tsv', '好\ta\n\nneutral\tb\n', ['line 3', "'neutral'", '好']),
    ('classify', 'a.jsonl', '{"label": "bad", "text": "b"}\n{"label": 3, "text": "b"}\n', ['line 2', '"label"']),
    ('classify', 'a.jsonl', '{"label": "none", "text": "b"}\n', ['line 1', "'none'"]),
    ('classify', 'a.tsv', '\n\n', ['no rows']),
    ('tag', 'a.conll', 'a O\nb\n', ['line 2', 'tag']),
    ('tag', 'a.conll', 'a O\n\nb B-none\n', ['line 3', "'B-none'"]),
    ('tag', 'a.conll', '', ['no rows']),
    ('qa', 'a.json', '{"data": [', ['JSON']),
    ('qa', 'a.json', json.dumps(QUESTIONS, ensure_ascii=False, indent=1).replace('"answer_start": 12', '"answer_start": 13'),
     ['line', 'q2', 'answer_start 13']),
    ('qa', 'a.json', '{"data": []}', ['no rows']),
    ('mlm', 'a.txt', '', ['no text']),
    ('mlm', 'a.txt', 'ab字', ["'字'"]),
], ids=str)
def test_a_file_that_cannot_be_scored_is_one_line_with_its_name(ask, answerers, tmp_path, name, file, text, words):
    """Malformed rows and labels that the model never learned name file and line."""
    (tmp_path / file).write_text(text, encoding='utf-8')
    named = [] if words[0] == "'字'" else [file]
    assert is_one_line(ask('--init_from', answerers / f'{name}.pt', '--score', tmp_path / file), *named, *words)


def test_answers_come_from_a_process_of_its_own(answerers, tmp_path):
    """As above, but with nothing between the user and the script: two lines by a pipe, whatever the console speaks."""
    environment = os.environ | {'PYTHONIOENCODING': 'ascii'}
    result = command('sample.py', '--init_from', answerers / 'tag.pt', '--start', '-', '--device', 'cpu', cwd=tmp_path,
                     env=environment, input='安 Merkel\n\n😀\n')
    lines = result.stdout.split('\n')
    assert len(lines) == 4 and lines[0].startswith('安/') and lines[1] == '' and lines[2].startswith('😀/'), result.stdout

# -----------------------------------------------------------------------------
# Text to text: beams

WRITERS = [*NAMES, 'transformer', 't5']


def stepwise(model, prompt, texts, source):
    """log P of every next token behind prompt + text, for texts of one length: (N, V). Nothing is cached."""
    ids = torch.tensor([[*prompt, *text] for text in texts])
    with torch.no_grad():
        if source is None:
            return model(ids)[0][:, -1].log_softmax(dim=-1)
        return model(torch.tensor([source] * len(ids)), decoder_ids=ids)[0][:, -1].log_softmax(dim=-1)


def every_text(model, prompt, source, n, V, penalty):
    """All that can be written with n tokens: [(score, tokens)], best first. Token 0 is the end."""
    found, live = [], [((), 0.0)]
    for length in range(1, n + 1):
        rows = stepwise(model, prompt, [text for text, _ in live], source).tolist()
        found += [((log_p + row[0]) / length ** penalty, list(text)) for (text, log_p), row in zip(live, rows)]
        live = [((*text, t), log_p + row[t]) for (text, log_p), row in zip(live, rows) for t in range(1, V)]
    found += [(log_p / n ** penalty, list(text)) for text, log_p in live]
    return sorted(found, key=lambda pair: -pair[0])


def searched(model, prompt, source, beams, n, penalty=1.0, **more):
    """beam_search for one prompt; source: what an encoder reads, None for a decoder alone."""
    cache = None
    if source is not None:
        with torch.inference_mode():
            cache = model.read(torch.tensor([source]))
    return beam_search(model, torch.tensor([prompt]), beams, n, penalty, end_id=0, cache=cache, **more)[0]


def same_texts(found, expected, about=''):
    """The same tokens in the same order, with the same scores up to rounding."""
    assert [t for _, t in found] == [t for _, t in expected], f'{about}: {found}, not {expected}'
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-4), f'{about}: {found}, not {expected}'


@pytest.mark.parametrize('preset', WRITERS)
@settings(max_examples=8)
@given(prompt=st.lists(st.integers(0, 3), min_size=1, max_size=3), beams=st.sampled_from([12, 13, 40]),
       penalty=st.sampled_from([0.0, 0.5, 1.0, 2.0]), seed=st.integers(0, 99))
def test_a_wide_beam_finds_what_trying_everything_finds(preset, prompt, beams, penalty, seed):
    """Four tokens, three steps, 40 texts: the best of them in order, with their scores, ended or not."""
    model = tiny(preset, 4, 8, seed)
    source = [2, *prompt, 1] if hasattr(model, 'read') else None
    expected = every_text(model, prompt, source, 3, 4, penalty)
    assert len(expected) == 40
    same_texts(searched(model, prompt, source, beams, 3, penalty), expected[:beams], (prompt, penalty))


@pytest.mark.parametrize('preset', ['gpt2', 'transformer'])
@settings(max_examples=10)
@given(penalties=st.lists(st.floats(0, 4), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_a_larger_length_penalty_never_prefers_the_shorter(preset, penalties, seed):
    """Of all texts the best gets longer, or stays, as the penalty grows; the end counts as a token."""
    # b11
    model = tiny(preset, 4, 8, seed)
    source = [1, 2] if hasattr(model, 'read') else None
    best = [searched(model, [0], source, 40, 3, penalty)[0] for penalty in sorted(penalties)]
    lengths = [min(3, len(tokens) + 1) for _, tokens in best]
    assert lengths == sorted(lengths), f'{sorted(penalties)}: {best}'


def test_scores_of_beams_by_hand():
    """
    Two beams: 'a' then the end, .6 x .5 = .3; the end at once, .1; 'b' then the end, .3 x .9 = .27. The length counts new
    tokens and the end, and not the prompt.
    """
    # b11
    steps = [[[.1, .6, .3]] * 2, [[.5, .3, .2], [.9, .05, .05]], [[.98, .01, .01]] * 2]
    for prompt in ([0], [1, 2, 1, 2, 1]):
        for penalty in (0.0, 1.0, 2.0):
            model = ByHeart(lambda step: torch.tensor(steps[step][:1 if step == 0 else 2]).log())
            found = beam_search(model, torch.tensor([prompt]), 2, 2, penalty, end_id=0)[0]
            # at two tokens: 'aa' .18, and .3, .27 of what has ended with length 2; '' has length 1
            scores = {(1,): math.log(.3) / 2 ** penalty, (2,): math.log(.27) / 2 ** penalty, (): math.log(.1),
                      (1, 1): math.log(.18) / 2 ** penalty}
            expected = sorted(((s, list(t)) for t, s in scores.items()), key=lambda pair: -pair[0])[:2]
            same_texts(found, expected, (prompt, penalty))


def test_a_search_ends_when_what_grows_is_worse_now_and_not_before():
    """After two sure ends the model is not asked again; while what grows would still score better, it is."""
    sure = [[[.9, .05, .05]], [[.98, .01, .01]] * 2] + [[[.4, .3, .3]] * 2] * 6
    model = ByHeart(lambda step: torch.tensor(sure[step]).log(), 20)
    found = beam_search(model, torch.tensor([[0]]), 2, 8, 0.0, end_id=0)[0]
    assert found[0] == (pytest.approx(math.log(.9)), []) and len(model.fed) <= 3, f'{found} after {model.fed}'
    # two have ended, [] and [1]; but [2, 2, ...] is already better than [1], goes on almost surely, and ends as the best
    late = [[[.3, .1, .6]], [[.01, .01, .98], [.98, .01, .01]]] + [[[.001, .001, .998]] * 2] * 5 + [[[.998, .001, .001]] * 2]
    model = ByHeart(lambda step: torch.tensor(late[step]).log(), 20)
    found = beam_search(model, torch.tensor([[0]]), 2, 8, 1.0, end_id=0)[0]
    p = math.log(.6) + math.log(.98) + 5 * math.log(.998) + math.log(.998)
    assert found[0] == (pytest.approx(p / 8, abs=1e-5), [2] * 7), f'{found} after {len(model.fed)} steps'


def test_equal_texts_have_equal_scores_in_any_row():
    """Where all tokens are as likely, a score depends on the length alone, and every row of the batch gets the same list."""
    # b11
    for rows in (1, 3):
        model = ByHeart(lambda step: torch.zeros(rows if step == 0 else rows * 4, 5), 20)
        found = beam_search(model, torch.zeros(rows, 1, dtype=torch.long), 4, 3, 0.5, end_id=0)
        for row in found:
            assert row == found[0] and len({tuple(tokens) for _, tokens in row}) == 4, row
            for score, tokens in row:
                n = min(3, len(tokens) + 1)
                assert score == pytest.approx(-n * math.log(5) / n ** 0.5, abs=1e-5), (score, tokens)


@pytest.mark.parametrize('preset', WRITERS)
@settings(max_examples=5)
@given(sources=st.lists(st.text('ab人', min_size=1, max_size=12), min_size=2, max_size=6), beams=st.integers(1, 4),
       data=st.data())
def test_mates_in_a_batch_and_their_order_change_no_answer(preset, sources, beams, data):
    """Sources of any lengths together, padded, are answered as each alone, whatever the order; scores, too."""
    # b11
    tokenizer = char_tokenizer(set('ab人'))
    model = tiny(preset, tokenizer.n_vocab, 32, seed=4)
    how = Settings(num_beams=beams, max_new_tokens=8, length_penalty=0.7)
    rows = lambda texts: encode_rows(tokenizer, 'seq2seq', [{'source': text} for text in texts], [], 32)
    order = data.draw(st.permutations(range(len(sources))))
    together = write_targets(model, tokenizer, rows([sources[i] for i in order]), how)
    for i, found in zip(order, together):
        [expected] = write_targets(model, tokenizer, rows([sources[i]]), how)
        assert found['target'] == expected['target'], f'{sources[i]!r} among {sources}: {found}, not {expected}'
        for a, b in zip(found.get('n_best', []), expected.get('n_best', []), strict=True):
            assert a['text'] == b['text'] and a['score'] == pytest.approx(b['score'], abs=1e-4), f'{found}, not {expected}'
        assert ('n_best' in found) == (beams > 1)


def test_a_long_neighbour_leaves_a_prompt_its_room():
    """A decoder's prompt and answer share block_size: how much there is for an answer depends on its own prompt alone."""
    # b11
    tokenizer, longest = char_tokenizer(set('ab')), 0
    rows = lambda *texts: encode_rows(tokenizer, 'seq2seq', [{'source': text} for text in texts], [], 24)
    for beams, seed in itertools.product((1, 3), range(4)):
        model, how = tiny('gpt2', tokenizer.n_vocab, 24, seed), Settings(num_beams=beams, max_new_tokens=12)
        [expected] = write_targets(model, tokenizer, rows('ab'), how)
        both = write_targets(model, tokenizer, rows('ab', 'ab' * 10), how)
        longest = max(longest, len(expected['target']))
        assert both[0]['target'] == expected['target'], f'{both[0]} beside a long prompt, {expected} alone'
    assert longest > 4, 'the test would not notice'


def test_a_drawn_answer_does_not_depend_on_the_other_lines():
    """With --temperature a line has draws of its own: another text in another line changes nothing."""
    # b11
    tokenizer = char_tokenizer(set('ab人'))
    how = Settings(temperature=1.0, max_new_tokens=8, seed=3)
    for preset in ('transformer', 'gpt2'):
        model = tiny(preset, tokenizer.n_vocab, 32, seed=4)
        answers = [write_targets(model, tokenizer, encode_rows(tokenizer, 'seq2seq', [
            {'source': text} for text in ('abab', other)], [], 32), how)[0]['target'] for other in ('a', '人' * 9)]
        assert answers[0] == answers[1], f'{preset}: {answers}'


class Forgetful:
    """A model whose cache holds nothing but the ids so far, which are read again at every step."""

    def __init__(self, model):
        self.model, self.config = model, model.config

    def decode(self, ids, keep=None, cache=None):
        cache['ids'] = torch.cat([cache['ids'], ids], dim=1) if 'ids' in cache else ids
        if 'source' in cache:
            return self.model(cache['source'], decoder_ids=cache['ids'])[0][:, -1]
        return self.model(cache['ids'])[0][:, -1]


@pytest.mark.parametrize('preset', WRITERS)
@settings(max_examples=6)
@given(seed=st.integers(0, 99), beams=st.integers(2, 5), rows=st.integers(1, 3))
def test_beams_with_a_cache_are_beams_without(preset, seed, beams, rows):
    """Also where beams die and others are doubled: all that a step keeps moves with its beam."""
    # b10, b11
    model = tiny(preset, 7, 12, seed)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(7, size=(rows, 4)))
    first, cache, plain = ids, {}, {}
    if hasattr(model, 'read'):
        first = ids[:, :1]
        with torch.inference_mode():
            cache, plain = model.read(ids), {'source': ids}
    found = beam_search(model, first, beams, 7, 0.8, end_id=0, cache=cache)
    for a, b in zip(found, beam_search(Forgetful(model), first, beams, 7, 0.8, end_id=0, cache=plain), strict=True):
        same_texts(a, b)


def test_pick_rows_moves_every_kind_of_cache():
    """Tensors by their first dimension, the state of an LSTM by its second, dicts within; numbers and None stay."""
    keys, state = torch.arange(12).view(3, 2, 2), (torch.arange(6).view(2, 3), torch.arange(6, 12).view(2, 3))
    old = {'length': 5, 'memory_keep': None, 'keep': keys > 4, 0: {'k': keys}, 'state': state}
    new = sample.pick_rows(old, torch.tensor([2, 0, 0, 2]))
    assert new['length'] == 5 and new['memory_keep'] is None and isinstance(new['state'], tuple)
    assert torch.equal(new[0]['k'], keys[[2, 0, 0, 2]]) and torch.equal(new['keep'], (keys > 4)[[2, 0, 0, 2]])
    assert [t.tolist() for t in new['state']] == [[[2, 0, 0, 2], [5, 3, 3, 5]], [[8, 6, 6, 8], [11, 9, 9, 11]]]
    assert torch.equal(old[0]['k'], keys), 'the old one has changed'


def test_pick_rows_leaves_a_source_to_all_of_its_beams_unless_others_are_picked():
    """What an encoder read, and the keys made of it, have a row a source; all else a row a beam."""
    memory, keep, keys = torch.arange(6).view(2, 3, 1), torch.tensor([[True], [False]]), torch.arange(8).view(4, 2)
    old = {'memory': memory, 'memory_keep': keep, 0: {'self': {'k': keys, 'length': 2}, 'cross': {'k': memory}}}
    rows = torch.tensor([3, 3, 2])
    for sources, expected in ((None, [0, 1]), (torch.tensor([1]), [1])):
        new = sample.pick_rows(old, rows, sources)
        assert torch.equal(new[0]['self']['k'], keys[rows]) and new[0]['self']['length'] == 2
        for found, before in ((new['memory'], memory), (new['memory_keep'], keep), (new[0]['cross']['k'], memory)):
            assert torch.equal(found, before[expected]), f'sources {sources}: {found.tolist()}'


@pytest.mark.parametrize('preset', WRITERS)
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=4), beams=st.integers(1, 4),
       penalty=st.sampled_from([0.0, 1.0, 2.5]), seed=st.integers(0, 99))
def test_a_search_beside_others_is_the_search_alone(preset, lengths, beams, penalty, seed):
    """Prompts or sources padded, rows that are done early or late: tokens and scores are those of each by itself."""
    # b11
    model, n = tiny(preset, 5, 24, seed), max(lengths)
    keep = torch.tensor([[False] * (n - length) + [True] * length for length in lengths])
    ids = torch.from_numpy(np.random.default_rng(seed).integers(1, 5, size=keep.shape))

    def search(ids, keep):
        if not hasattr(model, 'read'):
            return beam_search(model, ids, beams, 9, penalty, end_id=0, keep=keep)
        with torch.inference_mode():
            cache = model.read(ids, keep)
        return beam_search(model, torch.ones(len(ids), 1, dtype=torch.long), beams, 9, penalty, end_id=0, cache=cache)

    for i, found in enumerate(search(ids, keep)):
        same_texts(found, search(ids[i:i + 1, keep[i]], None)[0], f'row {i} of {lengths}')


def test_a_row_that_is_done_leaves_the_search():
    """Two beams, three rows: the model reads 3 rows, then two beams of each that is not done, and its sources likewise."""
    sure, open_ = [.98, .01, .01], [.001, .5, .499]
    steps = [[sure, open_, open_], [sure] * 2 + [open_] * 2 + [sure] * 2, [open_] * 2]
    read = []

    class Holds:
        def decode(self, ids, keep=None, cache=None):
            read.append((len(ids), cache['memory'].tolist(), cache['own'].tolist()) if 'own' in cache else (len(ids),))
            cache.setdefault('own', torch.tensor([10, 20, 30]))
            return torch.tensor(steps[len(read) - 1]).log()

    found = beam_search(Holds(), torch.zeros(3, 1, dtype=torch.long), 2, 3, end_id=0, cache={'memory': torch.arange(3)})
    # row 0 has the text '' and one that begins with 1, and grows on; rows 0 and 2 are done after two steps, row 1 never
    assert read == [(3,), (6, [0, 1, 2], [10, 10, 20, 20, 30, 30]), (2, [1], [20, 20])], read
    assert [len(row) for row in found] == [2] * 3 and [row[0][1] for row in found] == [[], [1, 1, 1], [1]], found


@pytest.mark.parametrize('preset', ['transformer', 't5'])
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), beams=st.integers(2, 5), seed=st.integers(0, 99))
def test_beams_of_one_source_share_it_and_find_what_copies_of_it_find(preset, lengths, beams, seed):
    """The keys of a source are made once and held once, however many beams; the texts are those of a search with copies."""
    model, n = tiny(preset, 7, 12, seed), max(lengths)
    keep = torch.tensor([[True] * length + [False] * (n - length) for length in lengths])
    ids = torch.from_numpy(np.random.default_rng(seed).integers(7, size=keep.shape))
    held, decode = [], model.decode

    class Copies(Forgetful):
        """One row of source a beam, made anew at every step from the row of the prompt."""
        def decode(self, new, mask=None, cache=None):
            cache['ids'] = torch.cat([cache['ids'], new], dim=1) if 'ids' in cache else new
            return self.model(cache['source'], cache['real'], cache['ids'])[0][:, -1]

    def watch(new, mask=None, cache=None):
        logits = decode(new, mask, cache)
        held.append((len(new), len(cache['memory']), len(cache[0]['cross']['k'])))
        return logits

    with torch.inference_mode():
        cache = model.read(ids, keep)
    model.decode = watch
    first = torch.ones(len(ids), 1, dtype=torch.long)
    found = beam_search(model, first, beams, 7, 0.8, end_id=0, cache=cache)
    copied = beam_search(Copies(model), first, beams, 7, 0.8, end_id=0, cache={'source': ids, 'real': keep})
    for a, b in zip(found, copied, strict=True):
        same_texts(a, b, lengths)
    assert all(rows == memory == keys or rows == beams * memory == beams * keys for rows, memory, keys in held), held


@pytest.mark.parametrize('preset', WRITERS)
@settings(max_examples=8)
@given(seed=st.integers(0, 99), n=st.integers(1, 8))
def test_a_single_beam_is_greedy(preset, seed, n):
    """One beam takes the likeliest token, and ends where that is the end."""
    model = tiny(preset, 6, 12, seed)
    source = [1, 2, 3] if hasattr(model, 'read') else None
    with torch.inference_mode():
        cache = model.read(torch.tensor([source])) if source else None
    steps = [int(t) for t in generate(model, torch.tensor([[2]]), n, temperature=0, end_id=0, cache=cache)]
    expected = steps[:steps.index(0)] if 0 in steps else steps
    [(_, tokens)] = searched(model, [2], source, 1, n)
    assert tokens == expected, f'{tokens}, greedy {steps}'


def test_forbidden_tokens_are_in_no_beam():
    """However likely: neither special tokens nor rows that no token has."""
    model, forbidden = tiny('gpt2', 9, 12, seed=1), torch.tensor([False] * 5 + [True] * 4)
    free, tied = (searched(model, [2], None, 6, 6, forbidden=f) for f in (None, forbidden))
    assert max(t for _, tokens in free for t in tokens) > 4, 'the test would not notice'
    assert all(t < 5 and t for _, tokens in tied for t in tokens) and len(tied) == 6, tied


@pytest.mark.parametrize('preset', ['gpt2', 'palm', 'llama', 'lstm'])
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_prompts_padded_on_the_left_go_on_as_each_alone(preset, lengths, seed):
    """keep marks what is real: the tokens are those of every prompt by itself."""
    # b10, b11
    model, rng = tiny(preset, 11, 24, seed), np.random.default_rng(seed)
    prompts, longest = [rng.integers(11, size=n).tolist() for n in lengths], max(lengths)
    ids = torch.tensor([[7] * (longest - len(p)) + p for p in prompts])
    keep = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])
    together = torch.stack(list(generate(model, ids, 12, temperature=0, keep=keep)), dim=1).tolist()
    for prompt, found in zip(prompts, together):
        by_itself = [int(t) for t in generate(model, torch.tensor([prompt]), 12, temperature=0)]
        assert found == by_itself, f'{prompt} of {lengths}: {found}, alone {by_itself}'


@pytest.mark.parametrize('beams', [1, 3])
def test_a_text_ends_at_its_end_token_and_it_is_not_part_of_it(beams):
    """A model that has learned one answer by heart writes it and no more, whatever room is left."""
    tokenizer = char_tokenizer(set('ab人'))
    end_id, answer = tokenizer._special_tokens['<|endoftext|>'], encode(tokenizer, '人ba').tolist()

    class Knows(torch.nn.Module):
        config = dataclasses.replace(PRESETS['transformer'], block_size=32, vocab_size=tokenizer.n_vocab)

        def parameters(self):
            return iter([torch.zeros(1)])

        def read(self, ids, keep=None):
            return {'step': 0}

        def decode(self, ids, keep=None, cache=None):
            logits = torch.full((len(ids), tokenizer.n_vocab), -5.0)
            logits[:, [*answer, *[end_id] * 40][cache['step']]] = 5.0
            cache['step'] += 1
            return logits

    rows = encode_rows(tokenizer, 'seq2seq', [{'source': 'a'}, {'source': 'abb'}], [], 32)
    found = write_targets(Knows(), tokenizer, rows, Settings(num_beams=beams, max_new_tokens=30))
    assert [f['target'] for f in found] == ['人ba'] * 2, found

# -----------------------------------------------------------------------------
# Beams of a text that goes on


def all_texts(model, tokenizer, prompt, characters, n, penalty):
    """Every way to go on with these characters, at most n of them or tokens with the end: [(score, text)], best first."""
    end_id = tokenizer._special_tokens['<|endoftext|>']
    allowed = [*encode(tokenizer, characters).tolist(), end_id]
    begin, found, live = encode(tokenizer, prompt).tolist() or [end_id], [], [('', 0.0)]
    for length in range(1, n + 1):
        ids = torch.tensor([begin + encode(tokenizer, text).tolist() for text, _ in live])
        with torch.no_grad():
            rows = model(ids)[0][:, -1, allowed].log_softmax(dim=-1).tolist()          # among what is text alone
        found += [((p + row[-1]) / length ** penalty, text) for (text, p), row in zip(live, rows)]
        live = [(text + c, p + row[i]) for (text, p), row in zip(live, rows) for i, c in enumerate(characters)]
    return sorted(found + [(p / n ** penalty, text) for text, p in live], reverse=True)


@pytest.mark.parametrize('preset', NAMES)
@settings(max_examples=6)
@given(prompt=st.text('人🙂', max_size=4), penalty=st.sampled_from([0.0, 1.0, 2.0]), n_best=st.integers(1, 15),
       seed=st.integers(0, 99))
def test_beams_of_a_text_are_the_best_of_all_texts(preset, prompt, penalty, n_best, seed):
    """Two characters, three steps, 15 texts: so many of the best as were asked for, with their scores, best first."""
    # b11
    tokenizer = char_tokenizer(set('人🙂'))
    model = tiny(preset, tokenizer.n_vocab, 16, seed)
    how = Settings(num_beams=15, num_samples=n_best, max_new_tokens=3, length_penalty=penalty)
    same_texts([(score, text) for score, text in write_beams(model, tokenizer, prompt, how)],
               all_texts(model, tokenizer, prompt, '人🙂', 3, penalty)[:n_best], repr(prompt))


def test_a_stop_cuts_what_beams_have_found():
    """At its first place, and it is not part of the text; the score is that of all that was found."""
    tokenizer = char_tokenizer(set('ab。'))
    model = tiny('gpt2', tokenizer.n_vocab, 16, seed=3)
    how = dict(num_beams=8, num_samples=8, max_new_tokens=6, length_penalty=2.0)
    whole, cut = (write_beams(model, tokenizer, 'ab', Settings(**how, stop=stop)) for stop in ([], ['。', 'ba']))
    assert sum('。' in text or 'ba' in text for _, text in whole) > 2, f'the test would not notice: {whole}'
    assert cut == [(score, re.split('。|ba', text)[0]) for score, text in whole], f'{cut} of {whole}'


@settings(max_examples=20)
@given(prompt=st.text('ab人', max_size=20), block_size=st.integers(1, 9), n=st.integers(1, 12), beams=st.integers(2, 3))
def test_a_search_sees_the_newest_part_of_a_long_prompt_and_has_one_window(prompt, block_size, n, beams):
    """As much of the prompt as leaves room for all new tokens, half of the window at least; it writes till that is full."""
    tokenizer = char_tokenizer(set('ab人'))
    end_id = tokenizer._special_tokens['<|endoftext|>']
    model, read = tiny('gpt2', tokenizer.n_vocab, block_size, seed=1), []
    never = torch.zeros(tokenizer.n_vocab).index_fill(0, torch.tensor(end_id), -99.0)  # does a text end by itself
    decode = model.decode
    model.decode = lambda ids, *rest: read.append(ids.tolist()) or decode(ids, *rest) + never
    found = write_beams(model, tokenizer, prompt, Settings(num_beams=beams, max_new_tokens=n))
    ids = encode(tokenizer, prompt).tolist() or [end_id]
    seen = ids[-max(1, block_size // 2, block_size - n):]
    assert read[0] == [seen], f'{read[0]} of {ids} with a window of {block_size} and {n} to write'
    room = max(1, min(n, block_size - len(seen)))
    assert len(read) == room == len(found[0][1]) and len(found) == 1, f'{len(read)} steps in a room of {room}: {found}'


# -----------------------------------------------------------------------------
# Text to text: scores

PLAIN = st.lists(st.sampled_from(
    ['the', 'cat', 'Cat', 'sat', 'mat.', '3.14', '1,000', "don't", 'x-ray', '5-', 'a,b', '(on)', '&quot;', '&amp;amp;', 'é',
     '$5', 'e.g.', 'end', '.', '-', '<skipped>', '“q”', '😀', 'İ', '٣,٤', '…', 'ein', 'Straße']), max_size=12).map(' '.join)
CHINESE = st.text('人之初性本善。，、the 3.5-!（）「」😀é', max_size=14)


@given(st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=6))
@example([('the cat sat on the mat.', 'the cat sat on the mat.')])
@example([('the cat', 'the cat')])
@example([('', 'the cat')])
@example([('the the the the', 'the cat sat mat.')])
def test_bleu_is_that_of_sacrebleu(pairs):
    """Its defaults: 13a tokens, exponential smoothing, one reference."""
    guesses, rights = [list(texts) for texts in zip(*pairs)]
    expected = sacrebleu.corpus_bleu(guesses, [rights]).score
    assert sample.bleu(guesses, rights) == pytest.approx(expected, abs=1e-6), f'{guesses} against {rights}'


@given(st.lists(st.tuples(CHINESE, CHINESE), min_size=1, max_size=6))
@example([('人之初，性本善。', '人之初，性本善。')])
@example([('人之初', '人之初性本善')])
@example([('3-3ひ人', 'ひ人 a')])
@example([('“人”…—→', '“人”…—→初')])
def test_bleu_of_chinese_is_that_of_sacrebleu(pairs):
    """Where a reference holds CJK: its zh tokens, for all texts; else 13a."""
    guesses, rights = [list(texts) for texts in zip(*pairs)]
    wide = any(re.search('[人之初性本善ひ]', right) for right in rights)
    expected = sacrebleu.corpus_bleu(guesses, [rights], tokenize='zh' if wide else '13a').score
    assert sample.bleu(guesses, rights) == pytest.approx(expected, abs=1e-6), f'{guesses} against {rights}, wide {wide}'


def test_every_character_is_a_token_where_sacrebleu_says_so():
    """All of the first 2^16 characters, between letters, by both rules."""
    for name, wide in (('13a', False), ('zh', True)):
        tokenize = {'13a': Tokenizer13a, 'zh': TokenizerZh}[name]()
        text = ' '.join(f'a{chr(i)}b {chr(i)}1{chr(i)}2' for i in range(1, 0x10000) if not 0xd800 <= i <= 0xdfff)
        theirs, ours = tokenize(text).split(), sample.bleu_words(text, wide)
        wrong = [(a, b) for a, b in zip(theirs, ours) if a != b]
        assert theirs == ours, f'{name}: {wrong[:5]}, {len(theirs)} and {len(ours)} tokens'


@given(PLAIN, PLAIN)
@example('the cat sat on the mat', 'the mat sat on the cat')
@example('', '')
@example('!', 'a')
def test_rouge_is_that_of_rouge_score(guess, right):
    """F of rouge1, rouge2, rougeL without stems, for texts without CJK."""
    scores = RougeScorer(['rouge1', 'rouge2', 'rougeL']).score(right, guess)
    expected = [scores[name].fmeasure for name in ('rouge1', 'rouge2', 'rougeL')]
    assert sample.rouge(guess, right) == pytest.approx(expected), f'{guess!r} against {right!r}'


@pytest.mark.parametrize('guess, right, expected', [
    ('人之初', '人之初', [1, 1, 1]),
    ('初之人', '人之初', [1, 0, 1 / 3]),
    ('人 之！', '人之初', [0.8, 2 / 3, 0.8]),                # 2 of 2 and 2 of 3; 1 of 1 and 1 of 2
    ('the 人', 'The人', [1, 1, 1]),
    ('x', '人', [0, 0, 0])])
def test_rouge_of_chinese_by_hand(guess, right, expected):
    """Each CJK character is a word."""
    assert sample.rouge(guess, right) == pytest.approx(expected)


def test_scores_of_texts_by_hand():
    """BLEU of all together, ROUGE and exact match as means; white space around an answer does not count."""
    guesses, rights = [' two\n', 'twenty one', '人之'], ['two', 'twenty-two', '人之初']
    answers, golds = [{'target': g} for g in guesses], [[{'about': {'target': r}}] for r in rights]
    found = sample.text_to_text_scores(answers, golds)
    means = np.mean([sample.rouge(a, b) for a, b in zip(guesses, rights)], axis=0)
    assert list(found) == ['bleu', 'rouge1', 'rouge2', 'rougeL', 'exact_match']
    assert found['exact_match'] == pytest.approx(1 / 3)
    assert [found[name] for name in ('rouge1', 'rouge2', 'rougeL')] == pytest.approx(means.tolist())
    assert means[0] == pytest.approx((1 + 0.5 + 0.8) / 3)
    assert found['bleu'] == pytest.approx(sacrebleu.corpus_bleu(guesses, [rights], tokenize='zh').score)
    assert json.loads(json.dumps(found)) == found, 'plain numbers'

# -----------------------------------------------------------------------------
# Text to text: the command


@pytest.fixture(scope='session')
def writers(tmp_path_factory):
    """Checkpoints of text to text: transformer.pt, gpt2.pt, lstm.pt, of bytes."""
    folder, tokenizer = tmp_path_factory.mktemp('writers'), byte_tokenizer()
    for name in ('transformer', 'gpt2', 'lstm'):
        save(folder / f'{name}.pt', tiny(name, tokenizer.n_vocab, 40, seed=2, dropout=0.5),
             tokenizer=tokenizer_to_dict(tokenizer), task='seq2seq', labels=[])
    return folder


@pytest.mark.parametrize('name', ['transformer', 'gpt2', 'lstm'])
def test_each_source_is_answered_by_a_line(ask, writers, name):
    """Lines in order, empty ones stay; --json has the target, and n_best with scores, best first, where beams were asked."""
    flags = ['--init_from', writers / f'{name}.pt', '--max_new_tokens', 9]
    sources = ['twenty one', '', '人之初', 'a b ||| c']
    status, out, err = ask(*flags, '--start', '-', stdin='\n'.join(sources).encode())
    assert status == 0 and out.count('\n') == 4 and out.split('\n')[1] == '' and err.count('\n') == 1, (out, err)
    assert ask(*flags, '--start', '\n'.join(sources))[1] == out, 'without a temperature the likeliest is taken'
    rows = [json.loads(line) for line in ask(*flags, '--start', sources[0], '--json')[1].splitlines()]
    assert [list(row) for row in rows] == [['text', 'target']] and rows[0]['text'] == sources[0], rows
    assert ' '.join(rows[0]['target'].split()) == out.split('\n')[0]
    [row] = [json.loads(line) for line in ask(*flags, '--start', sources[2], '--json', '--num_beams', 3)[1].splitlines()]
    scores = [found['score'] for found in row['n_best']]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and scores[0] < 0, row
    assert row['target'] == row['n_best'][0]['text'] and [*row['n_best'][0]] == ['text', 'score'], row
    flags += ['--start', sources[2], '--json', '--num_beams', 3, '--length_penalty']
    low, high = (json.loads(ask(*flags, penalty)[1])['n_best'] for penalty in (0, 5))
    assert low != high, 'the penalty changes nothing'


def test_a_temperature_draws_targets_with_the_seed(ask, writers):
    """The same seed the same text, another another; 0 is the likeliest."""
    flags = ['--init_from', writers / 'transformer.pt', '--start', 'abc', '--max_new_tokens', 12, '--json']
    said = lambda *more: ask(*flags, *more)[1]
    assert said('--temperature', 1, '--seed', 1) == said('--temperature', 1, '--seed', 1)
    assert said('--temperature', 1, '--seed', 1) != said('--temperature', 1, '--seed', 2)
    assert said('--temperature', 0) == said()


@pytest.mark.parametrize('name', ['transformer', 'gpt2'])
def test_a_score_of_texts_is_that_of_the_answers(ask, writers, tmp_path, name):
    """--score reads TSV or JSONL and scores what --start would have answered, with beams where those are asked for."""
    sources, flags = ['twenty one', '人之初', 'abc'], ['--init_from', writers / f'{name}.pt', '--max_new_tokens', 9]
    for more in ([], ['--num_beams', 2]):
        said = [json.loads(row)['target']
                for row in ask(*flags, *more, '--start', '\n'.join(sources), '--json')[1].splitlines()]
        rights = [' '.join((said[0] + ' x').split()) or 'x', '人', 'b b']
        (tmp_path / 'a.tsv').write_text(''.join(f'{a}\t{b}\n' for a, b in zip(sources, rights)), encoding='utf-8')
        (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'source': a, 'target': b}) + '\n'
                                                  for a, b in zip(sources, rights)))
        expected = sample.text_to_text_scores([{'target': t} for t in said], [[{'about': {'target': t}}] for t in rights])
        for file in ('a.tsv', 'a.jsonl'):
            found = json.loads(ask(*flags, *more, '--score', tmp_path / file, '--json')[1])
            assert [*found] == ['bleu', 'rouge1', 'rouge2', 'rougeL', 'exact_match'] and found == pytest.approx(expected)
        status, out, err = ask(*flags, *more, '--score', tmp_path / 'a.tsv')
        assert (status, err) == (0, '') and out.startswith(f"bleu {expected['bleu']:.2f}, rouge1 "), (out, err)


@pytest.mark.parametrize('file, text, words', [
    ('a.tsv', 'a\tb\nno tab\n', ['line 2', 'source<TAB>target', '1 column']),
    ('a.tsv', 'a\tb\n\nc\td\n', ['line 2', 'source<TAB>target']),
    ('a.tsv', 'a\t \n', ['line 1', 'empty']),
    ('a.tsv', 'a\tb\n' + '长' * 14 + '\tb\n', ['line 2', 'source', '43 tokens', '40']),
    ('a.tsv', '\n', ['line 1']),
    ('a.tsv', '', ['no rows']),
    ('a.jsonl', '{"source": "a", "target": "b"}\n{"source": "a"}\n', ['line 2', '"target"'])], ids=str)
def test_a_file_of_texts_that_cannot_be_scored_is_one_line(ask, writers, tmp_path, file, text, words):
    """Named with file and line."""
    (tmp_path / file).write_text(text, encoding='utf-8')
    assert is_one_line(ask('--init_from', writers / 'gpt2.pt', '--score', tmp_path / file), file, *words)


@pytest.mark.parametrize('start, words', [
    ('长' * 14, ['43 tokens', '40']), ('a\nb\n' + '长' * 14, ['line 3', '43 tokens']), ('', ['--start is empty']),
    ('\n\n', ['--start is empty'])], ids=str)
def test_a_source_that_cannot_be_answered_is_one_line(ask, writers, start, words):
    """Longer than the model reads, or nothing; nothing is answered before all are read."""
    for name in ('transformer', 'gpt2'):
        assert is_one_line(ask('--init_from', writers / f'{name}.pt', '--start', start), *words)


@pytest.mark.parametrize('flags, words', [(['--num_beams', 0], ['--num_beams 0']),
                                          (['--length_penalty', -1], ['--length_penalty -1'])], ids=str)
def test_beams_have_bounds(ask, writers, flags, words):
    """One line."""
    assert is_one_line(ask('--init_from', writers / 'gpt2.pt', '--start', 'a', *flags), *words)

# -----------------------------------------------------------------------------
# Weights made for reading


@pytest.mark.parametrize('preset', ['gpt2', 'llama', 'palm', 'nano', 'lstm', 't5', 'transformer'])
@pytest.mark.parametrize('dtype, near', [('float32', 1e-4), ('bfloat16', 0.2), ('int8', 0.25)])
def test_weights_made_for_reading_say_what_they_said(preset, dtype, near):
    """Packed or of one byte: for one row, for many, and with a cache; all matrices but those that are read in parts."""
    torch.manual_seed(4)
    plain = build(dataclasses.replace(PRESETS[preset], vocab_size=50, block_size=24, n_layer=2, n_embd=32, n_head=4,
                                      n_kv_head=min(2, PRESETS[preset].n_kv_head), head_dim=0, mlp_dim=48)).eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.dim() > 1 else 0.1) + (1.0 if p.dim() < 2 else 0.0))
    packed = sample.cast(copy.deepcopy(plain), dtype)
    kinds = {name.split('.')[-1] for name, m in packed.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds <= {'qkv'} and isinstance(packed.output, sample.Packed), kinds
    ids = torch.randint(0, 50, (3, 9))
    with torch.inference_mode():
        if hasattr(plain, 'read'):
            caches = [model.read(ids) for model in (plain, packed)]
            found = [torch.cat([model.decode(ids[:, i:i + 1], cache=cache) for i in range(4)])
                     for model, cache in zip((plain, packed), caches)]
        else:
            found = [torch.cat([model.decode(ids, cache=cache), model.decode(ids[:, :1], cache=cache),
                                model(ids.repeat(9, 1))[0][:, -1]]) for model, cache in ((plain, {}), (packed, {}))]
    scale = found[0].std()
    assert scale > 0.05 and (found[0] - found[1].float()).abs().max() < near * scale, (
        (found[0] - found[1].float()).abs().max() / scale)


def test_one_byte_a_weight_is_at_most_half_a_step_off():
    """127 steps to the largest weight of each row; a row of zeros stays one."""
    layer = torch.nn.Linear(40, 6)
    with torch.no_grad():
        layer.weight[2] = 0
        layer.weight[3] *= 100
    packed = sample.Packed(layer, 'int8')
    step = layer.weight.abs().amax(dim=1) / 127
    back = packed.weight.float() * packed.scale.float()[:, None]
    assert packed.weight.dtype == torch.int8 and (back[2] == 0).all()
    assert ((back - layer.weight).abs() <= step[:, None] * 1.02 + packed.weight.abs() * step[:, None] * 0.005).all()

# -----------------------------------------------------------------------------
# Attention maps

LOOKERS = ['gpt2', 'palm', 'llama', 'nano', 'bert', 'transformer', 't5']


def looker(preset, seed=0, **changes):
    """Two layers of four heads; where heads share keys, two and two do."""
    config = dataclasses.replace(PRESETS[preset], vocab_size=30, block_size=12, n_layer=2, n_head=4, n_embd=32, head_dim=8,
                                 n_kv_head=min(PRESETS[preset].n_kv_head, 2), mlp_dim=24, **changes)
    model = build(config)
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


def padded_batch(model, lengths, left, seed):
    """Rows of random ids, padded on one side; a decoder that reads a source has a row of seven ids."""
    draw, longest = np.random.default_rng(seed), max(lengths)
    keep = torch.tensor([[False] * (longest - n) + [True] * n if left else [True] * n + [False] * (longest - n)
                         for n in lengths])
    ids = lambda size: torch.from_numpy(draw.integers(30, size=(len(lengths), size)))
    return {'ids': ids(longest), 'keep': keep} | ({'decoder_ids': ids(7)} if hasattr(model, 'read') else {})


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@pytest.mark.parametrize('preset', LOOKERS)
@settings(max_examples=6)
@given(lengths=LENGTHS, left=st.booleans(), seed=st.integers(0, 99))
def test_the_weights_that_are_shown_are_those_that_the_fused_kernel_used(preset, lengths, left, seed):
    """In every layer, weights @ values is what came out; keys that heads share, distances and padding included. b3"""
    model, used, fused = looker(preset, seed), [], model_py.attention
    batch = padded_batch(model, lengths, left, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_py, 'attention', lambda q, k, v, *rest: used.append((v, fused(q, k, v, *rest))) or used[-1][1])
        maps = sample.attention_maps(model, batch)
    own = ['encoder'] if preset == 'bert' else ['decoder']
    calls = [(name, i) for i in range(2) for name in own]
    if hasattr(model, 'read'):
        calls = [('encoder', 0), ('encoder', 1)] + [(name, i) for i in range(2) for name in ('decoder', 'cross')]
    assert len(calls) == len(used) and {name for name, _ in calls} == set(maps), maps.keys()
    for (name, layer), (v, y) in zip(calls, used):
        weights = torch.from_numpy(maps[name][layer])                                  # (B, H, T, S)
        found = weights @ v.repeat_interleave(4 // v.size(1), dim=1)
        assert torch.allclose(found, y, atol=1e-4), f'{name} {layer}: {(found - y).abs().max()} off'


@pytest.mark.parametrize('preset', LOOKERS)
@settings(max_examples=6)
@given(lengths=LENGTHS, left=st.booleans(), seed=st.integers(0, 99))
def test_a_row_sums_to_1_and_nobody_looks_ahead_or_at_padding(preset, lengths, left, seed):
    """Exact zeros, in the rows of real tokens. b3"""
    model = looker(preset, seed)
    batch = padded_batch(model, lengths, left, seed)
    source, target = batch['keep'].numpy(), np.ones((len(lengths), 7), bool)
    if not hasattr(model, 'read'):
        target = source
    for name, weights in sample.attention_maps(model, batch).items():                  # (layers, B, H, T, S)
        assert np.allclose(weights.sum(axis=-1), 1, atol=1e-5) and weights.min() >= 0, name
        rows, cols = {'encoder': (source, source), 'decoder': (target, target), 'cross': (target, source)}[name]
        assert weights.shape == (2, len(lengths), 4, rows.shape[1], cols.shape[1]), (name, weights.shape)
        hidden = rows[:, :, None] & ~cols[:, None, :]                                  # (B, T, S)
        if name == 'decoder':
            hidden |= rows[:, :, None] & np.triu(np.ones((rows.shape[1], cols.shape[1]), bool), 1)
        assert not (weights * hidden[:, None]).any(), f'{name} looks where it must not: {lengths}, left {left}'


def test_watching_changes_nothing_and_ends():
    """Neither the logits nor the mode, also where the forward pass fails; dropout does not act."""
    model, ids = looker('transformer', dropout=0.5), torch.randint(30, (2, 5))
    batch = {'ids': ids, 'decoder_ids': ids}
    before = model(**batch)[0]
    model.train()
    first, second = (sample.attention_maps(model, batch) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first) and model.training
    with pytest.raises(ValueError, match='longer than block_size'):
        sample.attention_maps(model, {'ids': ids, 'decoder_ids': torch.zeros(2, 13, dtype=torch.long)})
    assert all(m.seen is None for m in model.modules() if isinstance(m, model_py.Attention))
    assert torch.equal(model.eval()(**batch)[0], before)


def spelled(data):
    tokenizer = Pieces([data])
    tokenizer._special_tokens = {'[PAD]': 7, '<|endoftext|>': 7}
    return sample.spell_token(tokenizer, 0)


@pytest.mark.parametrize('data, expected', [
    (b' the', '␣the'), (b'\n\r\t ', '⏎␍⇥␣'), ('中'.encode(), '中'), ('中'.encode()[:2], '‹E4 B8›'), (b' a\xe4', '␣a‹E4›'),
    (b'\x98\x80b', '‹98 80›b'), ('\u200f\u200b'.encode(), '‹U+200F›‹U+200B›'), (b'</script>', '</script>')], ids=str)
def test_a_token_can_be_seen(data, expected):
    """Spaces, line ends, parts of characters, and what has no shape."""
    assert spelled(data) == expected


@given(st.binary(max_size=6))
def test_any_bytes_can_be_seen_and_written(data):
    """No white space, no control characters, and no half of a surrogate pair, which no file could hold."""
    text = spelled(data)
    assert text.isprintable() and ' ' not in re.sub('‹[^›]*›', '', text) and text.encode().decode() == text, text


class PageReader(html.parser.HTMLParser):
    """The scripts of a page, its tags, and their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.found, self.scripts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag == 'script':
            self.scripts.append('')
        self.tags.append(tag)

    def handle_endtag(self, tag):
        while self.tags.pop() != tag:
            pass

    def handle_data(self, data):
        if self.tags and self.tags[-1] == 'script':
            self.scripts[-1] += data


def page_of(text):
    """The data of a page, as {name: (tokens that look, tokens looked at, weights)}."""
    data, _ = PageReader(text).scripts
    return {m['name']: (m['rows'], m['cols'], np.array(m['weights']) / 1000) for m in json.loads(data)}


@settings(max_examples=30)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs']), max_size=9), min_size=1, max_size=5), st.integers(0, 99))
@example(['</script>', '<!--', '<script>', '中文', '😀', 'DATA', '\\u003c', '"', "'", '&lt;', '\u2028'], 0)
def test_a_page_holds_all_tokens_and_weights_whatever_they_are(tokens, seed):
    """No token ends the data or begins another tag; weights to a thousandth."""
    weights = np.random.default_rng(seed).dirichlet([0.3] * len(tokens), size=(2, 3, 4)).astype(np.float32)
    page = page_of(sample.attention_page({'cross': (['a'] * 4, tokens, weights)}))
    assert list(page) == ['cross'] and page['cross'][0] == ['a'] * 4 and page['cross'][1] == tokens, page
    assert np.abs(page['cross'][2] - weights).max() < 5.1e-4


def test_a_page_needs_nothing_but_itself():
    """No address, no file, no library; what its script asks for by name is there, and every control has its label."""
    page = sample.attention_page({'decoder': (['a'] * 128, ['a'] * 128, np.full((6, 6, 128, 128), 1 / 128))})
    assert len(page) < 3e6 and not re.search(r'https?:|url\(|@import|\bsrc=|\bhref=|fetch\(|import ', page), 'not alone'
    found = PageReader(page)
    ids = [about['id'] for _, about in found.found if 'id' in about]
    asked = set(re.findall(r"\$\('(\w+)'\)", found.scripts[1]))
    assert len(ids) == len(set(ids)) and asked <= set(ids) and len(asked) > 8, asked - set(ids)
    labels = [about['for'] for tag, about in found.found if tag == 'label']
    assert labels == [about['id'] for tag, about in found.found if tag == 'select'] == ['kind', 'layer', 'head'], labels


def looks(ask, file, *flags):
    """The page that `sample.py --attention` writes, and the one line that says so."""
    status, out, err = ask('--attention', file, *flags)
    assert (status, out) == (0, '') and err.startswith(f'{file}: ') and err.count('\n') == 1, (status, out, err)
    return page_of(file.read_text(encoding='utf-8')), err


def test_a_page_shows_the_prompt_and_the_weights_of_the_plain_model(ask, checkpoints, tmp_path):
    """Of a GPT; in float32, whatever is fast; the newest tokens where it is longer than the window, and it says so."""
    model, tokenizer = sample.open_model(checkpoints / 'best.pt')[0].eval(), char_tokenizer(CHARACTERS)
    page, err = looks(ask, tmp_path / 'a.html', '--start', '人之 😀\n')
    rows, cols, weights = page['decoder']
    assert list(page) == ['decoder'] and rows == cols == ['人', '之', '␣', '😀', '⏎'] and 'newest' not in err, (page, err)
    ids = torch.tensor([encode(tokenizer, '人之 😀\n').tolist()])
    assert np.abs(weights - sample.attention_maps(model, {'ids': ids})['decoder'][:, 0]).max() < 5.1e-4
    page, err = looks(ask, tmp_path / 'a.html', '--start', 'abc' * 7)
    assert ''.join(page['decoder'][0]) == ('abc' * 7)[-16:] and 'the newest of 21' in err, err
    page, _ = looks(ask, tmp_path / 'b.HTML', '--init_from', checkpoints / 'bytes.pt', '--start', '中a')
    assert page['decoder'][0] == ['‹E4›', '‹B8›', '‹AD›', 'a'] and set(os.listdir(tmp_path)) == {'a.html', 'b.HTML'}


@pytest.mark.parametrize('name', ANSWERERS)
def test_a_page_of_a_model_that_answers(ask, answerers, tmp_path, name):
    """What it reads of a line: one text or two, framed; a long one in parts, of which the first is shown."""
    start = 'ab ||| c' if name != 'mlm' else 'ab[MASK] ||| c'
    page, err = looks(ask, tmp_path / 'a.html', '--init_from', answerers / f'{name}.pt', '--start', start)
    [(kind, (rows, cols, weights))] = page.items()
    text = 'ab [MASK] [SEP] c' if name == 'mlm' else 'ab [SEP] c' if 'tag' not in name else 'ab ␣|␣|␣|␣c'
    assert ''.join(rows) == f"[CLS]{text.replace(' ', '')}[SEP]" and rows == cols, rows
    assert weights.shape == (2, 2, len(rows), len(rows)), weights.shape
    assert kind == ('encoder' if ANSWERERS[name][0] == 'bert' else 'decoder') and 'parts' not in err, (kind, err)
    if name in ('tag', 'qa', 'mlm'):
        start = {'tag': 'a ' * 40, 'qa': 'who ||| ' + 'a ' * 40, 'mlm': 'abc 人'}[name]
        page, err = looks(ask, tmp_path / 'a.html', '--init_from', answerers / f'{name}.pt', '--start', start)
        assert len(page[kind][0]) <= 40 and ('the first of' in err) == (name != 'mlm'), err


@pytest.mark.parametrize('n', [1, 9, 200])
def test_a_page_of_an_encoder_and_a_decoder(ask, tmp_path, n):
    """The source; the target that it writes greedily, without special tokens, behind its start; the target at the source."""
    tokenizer = byte_tokenizer()
    model = tiny('t5', tokenizer.n_vocab, 40, seed=6, tied=False)                      # it writes seven different bytes
    save(tmp_path / 'a.pt', model, tokenizer=tokenizer_to_dict(tokenizer))
    page, err = looks(ask, tmp_path / 'a.html', '--init_from', tmp_path / 'a.pt', '--max_new_tokens', n, '--start', '人 b')
    source, target = [*'‹E4› ‹BA› ‹BA› ␣ b <|endoftext|>'.split()], page['decoder'][0]
    assert list(page) == ['encoder', 'decoder', 'cross'] and page['encoder'][:2] == (source, source)
    assert page['decoder'][:2] == (target, target) and page['cross'][:2] == (target, source)
    assert target[0] == '<|endoftext|>' and len(target) <= min(n, 40) and f'{len(target)} of what it writes' in err, err
    ids = torch.tensor([[*encode(tokenizer, '人 b').tolist(), tokenizer._special_tokens['<|endoftext|>']]])
    decoder_ids = ids[:, -1:]
    with torch.no_grad():
        forbidden = forbidden_tokens(tokenizer, tokenizer.n_vocab)
        while decoder_ids.size(1) < len(target):
            new = model(ids, decoder_ids=decoder_ids)[0][:, -1].masked_fill(forbidden, -math.inf).argmax(dim=-1)
            decoder_ids = torch.cat([decoder_ids, new[:, None]], dim=1)
    assert target == [sample.spell_token(tokenizer, i) for i in decoder_ids[0].tolist()], 'not what is likeliest'
    for name, weights in sample.attention_maps(model, {'ids': ids, 'decoder_ids': decoder_ids}).items():
        assert np.abs(page[name][2] - weights[:, 0]).max() < 5.1e-4, name


def test_a_gpt_that_answers_reads_its_source_as_a_prompt(ask, writers, tmp_path):
    """Which ends in [SEP], as where it writes."""
    page, _ = looks(ask, tmp_path / 'a.html', '--init_from', writers / 'gpt2.pt', '--start', 'ab')
    assert page['decoder'][0] == ['a', 'b', '[SEP]']


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b'\x89PNG\r\n\x1a\n'
    return int.from_bytes(data[16:20], 'big'), int.from_bytes(data[20:24], 'big')


def test_a_picture_has_a_row_a_layer_and_a_column_a_head(ask, checkpoints, writers, tmp_path):
    """Named tokens need more room; characters that its font lacks, and dollars, are no reason for a word."""
    pytest.importorskip('matplotlib')
    tokenizer = char_tokenizer({'$', '𓀀', '人'})
    save(tmp_path / 'a.pt', tiny('gpt2', tokenizer.n_vocab, 40), tokenizer=tokenizer_to_dict(tokenizer))
    for flags, size in ((['--init_from', tmp_path / 'a.pt', '--start', '$𓀀$人$'], (640, 640)),
                        (['--init_from', tmp_path / 'a.pt', '--start', '$人' * 19], (320, 320)),
                        (['--init_from', writers / 'transformer.pt', '--start', 'ab', '--max_new_tokens', 5], (640, 1920))):
        status, out, err = ask('--attention', tmp_path / 'a.png', *flags)
        assert (status, out) == (0, '') and err.count('\n') == 1 and err.startswith(f"{tmp_path / 'a.png'}: 2 layers"), err
        assert png_size(tmp_path / 'a.png') == size, flags
    assert sample.attention_picture({'decoder': (['$\\no$'], ['$\\no$'], np.ones((1, 1, 1, 1)))}).startswith(b'\x89PNG')


def test_a_picture_draws_each_head_in_its_place(monkeypatch):
    """Row by row a layer, column by column a head: the roots of its weights."""
    figure = pytest.importorskip('matplotlib.figure')
    drawn, weights = [], np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float32)
    monkeypatch.setattr(figure.Figure, 'savefig', lambda self, file, **how: drawn.append(self))
    sample.attention_picture({'cross': (list('abcd'), list('vwxyz'), weights)})
    axes = drawn[0].axes
    assert [a.get_title() for a in axes] == [f'cross {i}, head {j}' for i in (1, 2) for j in (1, 2, 3)]
    assert np.allclose([a.images[0].get_array() for a in axes], weights.reshape(6, 4, 5) ** 0.5)
    assert [t.get_text() for t in axes[4].get_xticklabels()] == list('vwxyz')
    assert [t.get_text() for t in axes[4].get_yticklabels()] == list('abcd')


def test_without_matplotlib_a_picture_is_one_line_and_a_page_is_written(ask, tmp_path, monkeypatch):
    """It says what to install, and what needs nothing."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert is_one_line(ask('--start', 'ab', '--attention', tmp_path / 'a.png'), 'pip install matplotlib', '.html')
    assert os.listdir(tmp_path) == [] and looks(ask, tmp_path / 'a.html', '--start', 'ab')


@pytest.mark.parametrize('flags, words', [
    (['--attention', 'a.pdf', '--out_dir', 'nowhere'], ['--attention a.pdf', '.html', '.png']),   # before anything is read
    (['--attention', 'html'], ['--attention html', '.html', '.png']),
    (['--attention', 'a.html', '--score', 'a.txt'], ['--attention a.html', '--score']),
    (['--attention', 'a.html', '--export', 'there'], ['--attention a.html', '--export']),
    (['--attention', 'a.html', '--start', ''], ['--start is empty']),
    (['--attention', 'a.html', '--start', 'ab字'], ["'字'"]),
    (['--attention', 'nowhere/a.html'], ['nowhere']),
    (['--attention', 'a.html', '--init_from', 'mlm.pt', '--start', 'a\nb\nc'], ['one line', '3']),
    (['--attention', 'a.html', '--init_from', 'qa.pt', '--start', 'a'], ['question ||| context']),
    (['--attention', 'a.html', '--init_from', 'lstm.pt', '--start', 'a'], ['no attention', 'LSTM'])], ids=str)
def test_what_cannot_be_looked_at_is_one_line(ask, answerers, writers, tmp_path, monkeypatch, flags, words):
    """And nothing is written."""
    monkeypatch.chdir(tmp_path)
    found = {path.name: path for folder in (answerers, writers) for path in folder.iterdir()}
    assert is_one_line(ask('--start', 'ab', *(found.get(word, word) for word in flags)), *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('name', ['a.html', 'a.png'])
def test_a_full_disk_leaves_the_old_page_and_nothing_else(ask, tmp_path, monkeypatch, name):
    """One line; an older file of that name is whole. Where there is room, it is replaced."""
    pytest.importorskip('matplotlib')
    (tmp_path / name).write_text('old')

    def full(number):
        raise OSError(28, 'No space left on device', str(tmp_path / name))

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        assert is_one_line(ask('--start', 'ab', '--attention', tmp_path / name), name, 'No space left')
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == 'old'
    assert ask('--start', 'ab', '--attention', tmp_path / name)[0] == 0 and os.path.getsize(tmp_path / name) > 999
    assert '--attention' in ask('--help')[1]


# -----------------------------------------------------------------------------
# Learning in context


class Recaller:
    """A model that looks the letter up among the pairs before it, and says 0 where it is new."""
    training = False
    eval = train = lambda self, mode=False: self
    parameters = lambda self: iter([torch.zeros(1)])

    def __init__(self, forgets=0):
        self.forgets = forgets

    def __call__(self, ids):
        logits = torch.zeros(*ids.shape, 200)
        for row, out in zip(ids.tolist(), logits):
            for t in range(1, len(row), 2):
                known = dict(zip(row[1:t][self.forgets::2], row[2:t][self.forgets::2]))
                out[t, known.get(row[t], ord('0'))] = 1
        return logits, None


def test_a_model_that_looks_things_up_is_right_as_often_as_the_letter_was_shown():
    """Accuracy after n pairs: the share of letters that stand among them, and a tenth of the others by chance."""
    _, text = prepare_data.recall()
    documents = [d.strip('\n') for d in text.split('<|endoftext|>\n')][:200]
    tokens = np.array([[*d.encode(), 10, 199] for d in documents], np.uint16).ravel()
    scores = sample.shot_scores(Recaller(), tokens, 199)
    for n in (0, 1, 2, 4, 8, 16, 29):
        expected = np.mean([d[2 * n] in d[:2 * n:2] or d[2 * n + 1] == '0' for d in documents])
        assert scores[f'after_{n}'] == pytest.approx(expected, abs=1e-6), f'{n}: {scores}'
    assert scores['after_29'] > 0.95 > 0.2 > scores['after_0']
    assert sample.shot_scores(Recaller(1), tokens, 199)['after_29'] < 0.5, 'pairs are read from the wrong side'


def test_recall_that_was_cut_into_other_tokens_is_refused():
    """There, an answer is not every second token."""
    with pytest.raises(ValueError, match='--tokenizer char'):
        sample.shot_scores(Recaller(), np.arange(62, dtype=np.uint16), 199)


@pytest.mark.parametrize('logits, top_k, expected', [
    ([1.0, 1.0, 1.0, 0.0], 2, [0, 0, 1 / 2, 1 / 2]),
    ([0.0, 2.0, 1.0, 1.0], 2, [0, 0, 1 / (math.e + 1), math.e / (math.e + 1)])])
def test_of_equals_no_more_than_top_k_survive(logits, top_k, expected):
    """Exactly k, also where the k-th has an equal: which of the two stays is left open. b12"""
    found = probabilities(torch.tensor(logits), top_k=top_k)
    assert found.sort().values.tolist() == pytest.approx(expected, abs=2e-4), found
