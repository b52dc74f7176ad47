"""
sample.py: choosing tokens, generation, beams, text, batches, answers, scores, attention, commands.

Models here are tiny and random, with weights so large that no two logits are close. Where a test
needs certain logits, a mock model gives them. References are independent: seqeval, scikit-learn,
sacrebleu, rouge-score, SQuAD's definition written out, slow loops, and all sequences tried out.
b10 to b15 are families of bugs that users of similar projects met.
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import string
import subprocess
import sys
import types

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import DECODER_ONLY, ROOT, close, command, one_line, refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from model import IGNORE_INDEX, PRESETS, Attention, KVCache, build, save
from prepare_data import bpe_tokenizer, byte_tokenizer, char_tokenizer, encode_rows, load_tokenizer
from sample import (DECODERS, SCORES, Settings, TextStream, arrange_weights, beam_search, collate,
                    generate, predict, sample_token, suppressed_tokens, task_scores)

WRITERS = [*DECODER_ONLY, 'transformer', 't5']
VERSE = '人之初，性本善。\n性相近，习相远。\n'
STORY = VERSE + 'Once upon a time, a café: 😀👍🏽 e\u0301 👨‍👩‍👧.\n'
BPE = bpe_tokenizer([STORY * 3], 256 + 105 + 60)  # it merges some bytes of a character only
UNICODE = st.text(st.characters(exclude_categories=['Cs']))

def tiny(preset, vocab_size, block_size=8, seed=0, **changes):
    """A model of two small layers with large random weights; none of them is zero, as in `nano`."""
    sizes = dict(n_layer=2, n_head=2, n_kv_head=min(PRESETS[preset].n_kv_head, 1), n_embd=16,
                 mlp_dim=24, vocab_size=vocab_size, block_size=block_size)
    model = build(dataclasses.replace(PRESETS[preset], **sizes | changes))
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()

class Script(torch.nn.Module):
    """A mock model: step n gives logits(n), whatever it reads. read: the shape of each input."""

    def __init__(self, logits, block_size=8, vocab_size=10):
        super().__init__()
        self.weight, self.logits, self.read = torch.nn.Parameter(torch.zeros(1)), logits, []
        self.config = dataclasses.replace(PRESETS['gpt2'], block_size=block_size,
                                          vocab_size=vocab_size)

    def decode(self, ids, cache):
        self.read.append(tuple(ids.shape))
        return self.logits(len(self.read) - 1)

def next_logits(model, ids, source=None):
    """Logits of the token after ids, a list, by a forward pass without a cache or neighbours."""
    inputs = {'ids': ids} if source is None else {'ids': source, 'decoder_ids': ids}
    with torch.no_grad():
        return model(**{key: torch.tensor([row]) for key, row in inputs.items()})[0][0, -1]

def padded(sources):
    """Lists of ids as a tensor padded on the right, and its attention_mask."""
    batch = collate([{'ids': source} for source in sources], 1)
    return batch['ids'], batch.get('attention_mask')

def encoded(model, sources):
    """The cache of an encoder-decoder that has read the sources; None for a decoder alone."""
    if not hasattr(model, 'encode'):
        return None
    with torch.inference_mode():
        return model.encode(*padded(sources))

# -----------------------------------------------------------------------------
# Choosing tokens

FOUR = torch.tensor([0.10, 0.50, 0.15, 0.25]).log()
LOGITS = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=12)  # with ties

def shares(logits, n=20000, **how):
    """The share of an even grid of n draws that each token gets: its probability, up to 1/n."""
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = sample_token(logits.expand(n, -1), uniform, **how)
    return torch.bincount(tokens, minlength=len(logits)).double() / n

@pytest.mark.parametrize('how, expected', [
    ({}, [0.10, 0.50, 0.15, 0.25]),
    ({'temperature': 0.5}, [0.0290, 0.7246, 0.0652, 0.1812]),  # squares: .01 .25 .0225 .0625 / .345
    ({'temperature': 2.0}, [0.1655, 0.3701, 0.2027, 0.2617]),  # roots: .316 .707 .387 .5 / 1.911
    ({'temperature': 0}, [0, 1, 0, 0]),
    ({'temperature': 1e-300}, [0, 1, 0, 0]),
    ({'temperature': 1e300, 'top_p': 0.7}, [0, 1 / 3, 1 / 3, 1 / 3]),
    ({'top_k': 1}, [0, 1, 0, 0]),
    ({'top_k': 2}, [0, 2 / 3, 0, 1 / 3]),
    ({'top_k': 99}, [0.10, 0.50, 0.15, 0.25]),
    ({'top_p': 0.49}, [0, 1, 0, 0]),
    ({'top_p': 0.51}, [0, 2 / 3, 0, 1 / 3]),                   # the one that crosses p is kept
    ({'top_p': 0.76}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
    ({'top_p': 0.91}, [0.10, 0.50, 0.15, 0.25]),
    ({'top_k': 2, 'top_p': 0.6}, [0, 1, 0, 0]),                # of the two, the first has 2/3
    ({'top_k': 2, 'top_p': 0.7}, [0, 2 / 3, 0, 1 / 3]),
    ({'temperature': 0.5, 'top_p': 0.73}, [0, 0.8, 0, 0.2]),   # p counts after the temperature
], ids=str)
def test_a_token_is_drawn_with_the_probabilities_worked_out_by_hand(how, expected):
    """Four tokens with 0.10, 0.50, 0.15 and 0.25, under each flag and some pairs of flags. b12"""
    close(shares(FOUR, **how), torch.tensor(expected, dtype=torch.float64), 2e-4)

@given(LOGITS.map(torch.tensor), st.sampled_from([1.0, 1.5, 3.0]), st.integers(0, 14),
       st.one_of(st.just(1.0), st.floats(0, 1)))
@example(torch.tensor([1.0, 1.0, 1.0, 0.0]), 1.0, 2, 1.0)
@example(torch.tensor([0.0, 0.0, -math.inf]), 1.0, 0, 0.5)
def test_exactly_k_among_ties_then_the_smallest_set_that_reaches_p(logits, t, top_k, top_p):
    """No more than k are kept, no fewer than reach p, and their ratios stay. b12"""
    found = shares(logits, temperature=t, top_k=top_k, top_p=top_p)
    kept, p = found > 0, (logits.double() / t).softmax(dim=-1)
    k = min(top_k or len(logits), len(logits))
    p = p / p.topk(k).values.sum()
    assert kept.all() or logits[kept].min() >= logits[~kept].max(), f'{found} of {logits}'
    if top_p == 1:
        assert kept.sum() == min(k, (p > 0).sum()), f'{kept.sum()} are kept, not {k}'
    else:
        mass, least = p[kept].sum(), p[kept].min()
        assert mass >= top_p - 1e-9, f'those kept have {mass}, less than {top_p}'
        assert kept.sum() == 1 or mass - least < top_p + 1e-9, f'{least} was not needed'
    close(found, torch.where(kept, p, 0) / p[kept].sum(), 2e-4)

def test_a_logit_of_minus_infinity_is_never_chosen():
    """Not at either end of the interval from which a draw comes."""
    logits = torch.tensor([[-math.inf, 0, 0, -math.inf]] * 2)
    uniform = torch.tensor([0, 1 - 2 ** -53], dtype=torch.float64)
    for how in ({}, {'top_k': 3}, {'top_p': 0.9}, {'temperature': 1e-8}, {'temperature': 1e300}):
        assert {*sample_token(logits, uniform, **how).tolist()} == {1, 2}, how

# -----------------------------------------------------------------------------
# Generation

def written(model, ids, n, **how):
    """What generate yields, a list for each row."""
    return torch.stack(list(generate(model, ids, n, **how)), dim=1).tolist()

def slow_text(model, ids, n, source, row, seed, end_ids=(), **how):
    """The tokens of one row up to its end, by forward passes over the window alone."""
    rng, T, tokens = np.random.default_rng((seed, row)), model.config.block_size, []
    window = ids[-T:]
    while len(tokens) < n and not (tokens and tokens[-1] in end_ids):
        if len(window) > T:
            window = window[-max(1, T // 2):]  # the older half is forgotten
        uniform = torch.tensor([rng.random()], dtype=torch.float64)
        logits = next_logits(model, window, source)[None]
        tokens.append(sample_token(logits, uniform, **how).item())
        window = [*window, tokens[-1]]
    return tokens

@pytest.mark.parametrize('preset', WRITERS)
@settings(max_examples=10)
@given(prompt=st.integers(1, 9), block_size=st.integers(1, 8), rows=st.integers(1, 4),
       how=st.sampled_from([{'temperature': 0}, {'temperature': 2.0}, {'temperature': 1.5,
                            'top_k': 3}, {'temperature': 2.0, 'top_p': 0.8}]),
       end_ids=st.sampled_from([(), (0,), (4, 1)]), seed=st.integers(0, 99))
@example(prompt=8, block_size=8, rows=2, how={'temperature': 0}, end_ids=(), seed=0)
@example(prompt=3, block_size=4, rows=3, how={'temperature': 2.0}, end_ids=(0,), seed=1)
def test_cached_text_of_a_batch_is_the_uncached_text_of_each_row(preset, prompt, block_size, rows,
                                                                 how, end_ids, seed):
    """Beyond the window's end, drawn or greedy, whatever the neighbours are and end. b10"""
    rng, n, sources = np.random.default_rng(seed), 14, [None] * rows
    if preset in ('transformer', 't5'):  # text behind a source has one window
        prompt, block_size = 1, 15
        sources = [rng.integers(2, 7, rng.integers(1, 9)).tolist() for _ in range(rows)]
    plain = tiny(preset, 7, block_size, seed)
    model = arrange_weights(tiny(preset, 7, block_size, seed))
    ids = torch.from_numpy(rng.integers(7, size=(rows, prompt)))
    found = written(model, ids, n, seed=seed, end_ids=end_ids, cache=encoded(model, sources), **how)
    for i, tokens in enumerate(found):
        alone = slow_text(plain, ids[i].tolist(), n, sources[i], i, seed, end_ids, **how)
        assert tokens[:len(alone)] == alone, f'row {i}: {tokens}, alone {alone}'
        assert {*tokens[len(alone):]} <= {*end_ids}, f'row {i} goes on behind its end: {tokens}'
        other = written(model, ids[i:i + 1], n, seed=seed, rows=[i], end_ids=end_ids,
                        cache=encoded(model, sources[i:i + 1]), **how)
        assert other == [alone], f'row {i} by its number: {other}, not {alone}'
    lengths = [next((t + 1 for t, x in enumerate(row) if x in end_ids), n) for row in found]
    assert len(found[0]) == max(lengths), 'it goes on although all rows have ended, or stops early'

def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]

class Graph(TorchDispatchMode):
    """
    What torch.cuda.CUDAGraph is, on a CPU: it records operations and repeats them with the same
    tensors, so what Python computed in between stays as it was. Recording leaves all tensors as
    they were. An operation that reads a number or makes a tensor of a list is an error: on a GPU
    the first waits, and the second copies what will have changed.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        waits = r'scalar_dense|nonzero|masked_select|equal$|lift_fresh'
        assert not re.search(waits, call._schema.name), call
        for storage in (t.untyped_storage() for t in tensors((args, kwargs))):
            self.before.setdefault(storage._cdata, (storage, storage.clone()))
        self.calls.append((call, args, kwargs or {}, call(*args, **kwargs or {})))
        return self.calls[-1][-1]

    def replay(self):
        for call, args, kwargs, results in self.calls:
            for old, new in zip(tensors(results), tensors(call(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

@contextlib.contextmanager
def recording(graph, stream):
    with graph:
        yield
    for storage, old in graph.before.values():
        storage.copy_(old)

@pytest.mark.parametrize('how', [{'temperature': 0}, {'temperature': 2.0, 'top_k': 4},
                                 {'temperature': 2.0, 'top_p': 0.8, 'end_ids': (0, 4)}])
@pytest.mark.parametrize('preset', [*WRITERS, 'llama windows', 'gpt2 relative'])
def test_a_recorded_step_writes_what_steps_write(preset, how, monkeypatch):
    """A step as a CUDA graph, but on a CPU: see test_gpu.py. Beyond block_size, too."""
    name, *more = preset.split()
    changes = {'windows': {'window': '3 0'}, 'relative': {'positions': 'relative'}}
    model = arrange_weights(tiny(name, 7, 20, **changes.get(more[0], {}) if more else {}))
    sources, n = [[3, 1, 4], [1, 5], [2, 6, 5, 3]], 18
    if name not in ('transformer', 't5'):
        sources, n = [None] * 3, 50
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    run = lambda: written(model, ids, n, seed=3, cache=encoded(model, sources), **how)
    texts, to, graphs = run(), torch.Tensor.to, []
    stream = types.SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    stream.record_event = lambda: stream
    for owner, name, value in [
            (torch.Tensor, 'is_cuda', property(lambda t: True)),
            (torch.Tensor, 'to', lambda t, *a, **k: to(t, *a, **k).clone() if 'cpu' in a
             else to(t, *a, **k)),                         # to a CPU it always makes a copy
            (sample, 'capture_stream', lambda: stream),
            (torch.cuda, 'current_stream', lambda: stream),
            (torch.cuda, 'stream', contextlib.nullcontext), (torch.cuda, 'graph', recording),
            (torch.cuda, 'CUDAGraph', lambda: graphs.append(Graph()) or graphs[-1])]:
        monkeypatch.setattr(owner, name, value)
    assert run() == texts
    assert len(graphs) == (preset != 'lstm'), 'one graph serves a call, or an LSTM has one'

def test_arranged_weights_leave_the_layers_of_a_fork_alone():
    """Such as LoRA, which adds to the product of nn.Linear, also if that is little."""
    model, ids = tiny('llama', 7), torch.tensor([[1, 2, 3]])
    one, two = (block.attn for block in model.decoder.blocks)
    two.k = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh())
    one.project = lambda x, source: (one.q(x), one.k(source), 1.02 * one.v(source))
    one.experts = torch.nn.Parameter(torch.ones(2, 3, 4))
    close(model(ids)[0], arrange_weights(model)(ids)[0], 1e-4)  # the left one first

def test_each_step_reads_one_token_of_the_rows_that_go_on():
    """Where the window is full its newer half is read again, and ended rows are not read. b10"""
    model = Script(lambda step: torch.zeros(1, 5), block_size=4)
    written(model, torch.zeros(1, 3, dtype=torch.long), 7)
    assert model.read == [(1, n) for n in (3, 1, 2, 1, 1, 2, 1)], model.read
    steps = [[1, 2, 3], [4, 9, 5], [9, 6], [9]]            # row 1 ends second, then row 0, row 2
    model = Script(lambda step: F.one_hot(torch.tensor(steps[step]), 10).float())
    found = written(model, torch.zeros(3, 1, dtype=torch.long), 9, temperature=0, end_ids=[9])
    assert found == [[1, 4, 9, 9], [2, 9, 9, 9], [3, 5, 6, 9]], found
    assert model.read == [(3, 1), (3, 1), (2, 1), (1, 1)], model.read

@pytest.mark.parametrize('how', [{'temperature': 0}, {'temperature': 50.0}, {'top_k': 383},
                                 {'temperature': 1.0, 'top_p': 0.999}], ids=str)
def test_special_tokens_and_rows_of_a_padded_vocabulary_are_never_written(how):
    """Of 256 bytes, 105 special tokens and 23 rows of padding: bytes and <|endoftext|>. b14"""
    tokenizer, logits = byte_tokenizer(), torch.randn(8, 384)
    logits[:, 256:] += 9
    model, ids = Script(lambda step: logits, vocab_size=384), torch.zeros(8, 1, dtype=torch.long)
    suppressed = suppressed_tokens(model, tokenizer)
    allowed = {*range(256), tokenizer.end_id}
    assert set((~suppressed).nonzero()[:, 0].tolist()) == allowed
    found = written(model, ids, 50, suppressed=suppressed, **how)
    assert {t for row in found for t in row} <= allowed
    model = Script(lambda step: logits[:1] if step == 0 else logits[:3], vocab_size=384)
    found = beam_search(model, ids[:1], 3, 5, suppressed=suppressed)[0]
    assert {t for _, tokens in found for t in tokens} <= allowed, found

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_before_the_first_token(bad):
    """argmax of NaN is token 0: nothing may be written, searched or answered with it."""
    ids, logits = torch.zeros(1, 1, dtype=torch.long), torch.tensor([[0.0, bad]])
    model = tiny('bert', 30, task='classify', n_labels=2)
    model.head.bias.data[1] = bad
    for use in (lambda: next(generate(Script(lambda step: logits), ids, 3)),
                lambda: beam_search(Script(lambda step: logits), ids, 2, 3),
                lambda: predict(model, [{'ids': [1, 2]}], 0)):
        assert 'not finite' in one_line(ValueError, use)

# -----------------------------------------------------------------------------
# Beams

def same_texts(found, expected, note=''):
    """The same tokens in the same order, with the same scores up to rounding."""
    assert [t for _, t in found] == [t for _, t in expected], f'{note}: {found}, not {expected}'
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-4), note

def test_a_search_goes_on_while_an_unfinished_text_can_still_win():
    """It reads on while a growing text has the better score, and stops once none has."""
    sure = [[[.9, .05, .05]], [[.98, .01, .01]] * 2, *[[[.4, .3, .3]] * 2] * 6]
    model = Script(lambda step: torch.tensor(sure[step]).log(), 20)
    found = beam_search(model, torch.tensor([[0]]), 2, 8, 0.0, end_ids=[0])[0]
    assert found[0] == (pytest.approx(math.log(.9)), []) and len(model.read) <= 3, model.read
    late = [[[.3, .1, .6]], [[.01, .01, .98], [.98, .01, .01]],
            *[[[.001, .001, .998]] * 2] * 5, [[.998, .001, .001]] * 2]
    model = Script(lambda step: torch.tensor(late[step]).log(), 20)
    found = beam_search(model, torch.tensor([[0]]), 2, 8, 1.0, end_ids=[0])[0]
    p = math.log(.6) + math.log(.98) + 6 * math.log(.998)
    assert found[0] == (pytest.approx(p / 8, abs=1e-5), [2] * 7), found
    model = Script(lambda step: torch.tensor([[0, -math.inf]] * (1 + 2 * (step > 0))))
    assert beam_search(model, torch.tensor([[0]]), 3, 1) == [[(0, [0])]]

@pytest.mark.parametrize('preset', WRITERS)
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), beams=st.integers(1, 4),
       penalty=st.sampled_from([0.0, 1.0, 2.5]), end_ids=st.sampled_from([(0,), (0, 1, 2)]),
       seed=st.integers(0, 99))
@example(lengths=[3, 1, 4, 2], beams=2, penalty=1.0, end_ids=(0, 1, 2), seed=3)
def test_a_search_among_others_is_the_search_alone(preset, lengths, beams, penalty, end_ids, seed):
    """Sources of any lengths, padded and masked; rows that are done early or late. b10 b11"""
    model, rng, rows = tiny(preset, 5, 24, seed), np.random.default_rng(seed), len(lengths)
    sources = [rng.integers(1, 5, n).tolist() for n in lengths]
    ids = torch.from_numpy(rng.integers(1, 5, (rows, 2)))
    found = beam_search(model, ids, beams, 9, penalty, None, end_ids, encoded(model, sources))
    for i, texts in enumerate(found):
        alone = beam_search(model, ids[i:i + 1], beams, 9, penalty, None, end_ids,
                            encoded(model, sources[i:i + 1]))[0]
        same_texts(texts, alone, f'row {i} of {lengths}')

def test_each_beam_reads_its_own_source_when_another_row_is_done_at_once():
    """Row 0 is done after the first step; the beams of row 1 go on with the source of row 1. b11"""
    steps = torch.tensor([[[.4, .4, .1, .1], [.1, .1, .4, .4]],        # step 0: of source 0 and 1
                          [[.1, .1, .7, .1], [.7, .1, .1, .1]]])       # later steps
    found = []
    for sources in ([[0], [1]], [[1]]):
        ids, cache = torch.tensor(sources), KVCache(9, torch.tensor(sources))
        model = Script(lambda step, cache=cache: steps[min(step, 1), cache.memory[:, 0]].log())
        found.append(beam_search(model, ids, 2, 3, 1.0, None, [0, 1], cache)[-1])
    same_texts(*found)

def slow_beams(model, prompt, source, beams, n, penalty, end_ids):
    """One step after the other, for one prompt, without a cache: all extensions are sorted."""
    found, live = [], [(0.0, [])]
    best = lambda texts: sorted(texts, key=lambda text: -text[0])[:beams]
    for length in range(1, n + 1):
        longer = []
        for p, text in live:
            row = next_logits(model, [*prompt, *text], source).log_softmax(dim=-1).tolist()
            longer += [(p + x, [*text, t]) for t, x in enumerate(row)]
        for p, text in best(longer):
            if text[-1] in end_ids:
                found.append((p / length ** penalty, text[:-1]))
        live = best(text for text in longer if text[1][-1] not in end_ids)
        found = best(found)
        if len(found) == beams and live[0][0] / length ** penalty <= found[-1][0]:
            return found
    return best(found + [(p / n ** penalty, text) for p, text in live])

@pytest.mark.parametrize('preset', WRITERS)
@settings(max_examples=6)
@given(beams=st.integers(1, 4), n=st.integers(1, 8), penalty=st.sampled_from([0.0, 1.0, 2.0]),
       end_ids=st.sampled_from([(0,), (0, 2, 3)]), seed=st.integers(0, 99))
def test_a_narrow_beam_finds_what_a_slow_search_finds(preset, beams, n, penalty, end_ids, seed):
    """Each step keeps the best unfinished texts, and ends among the best; one beam is greedy."""
    model = tiny(preset, 6, 12, seed)
    source = [1, 2, 3] if hasattr(model, 'encode') else None
    found = beam_search(model, torch.tensor([[2]]), beams, n, penalty, end_ids=end_ids,
                        cache=encoded(model, [source]))[0]
    same_texts(found, slow_beams(model, [2], source, beams, n, penalty, end_ids))
    if beams == 1:
        steps = slow_text(model, [2], n, source, 0, 0, end_ids, temperature=0)
        assert found[0][1] == [t for t in steps if t not in end_ids]

# -----------------------------------------------------------------------------
# Text as it is generated

@pytest.fixture(scope='session')
def foreign(tmp_path_factory):
    """Tokenizers of other models: WordPiece without accents, and pieces that carry their spaces."""
    hf = pytest.importorskip('tokenizers')
    folder, other = (tmp_path_factory.mktemp(name) for name in ('wordpiece', 'metaspace'))
    letters = sorted('abcdefghortuz.,!?0123人之初кот')
    vocab = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters, *('##' + c for c in letters),
             'cat', '##at', 'the']
    (folder / 'vocab.txt').write_text('\n'.join(vocab), encoding='utf-8')
    (folder / 'tokenizer_config.json').write_text('{"tokenizer_class": "BertTokenizer"}')
    pieces = ['<s>', '</s>', '<unk>', *(f'<0x{i:02X}>' for i in range(256)), '▁', 'a', '▁a', '人']
    engine = hf.Tokenizer(hf.models.BPE({piece: i for i, piece in enumerate(pieces)},
                                        [('▁', 'a')], byte_fallback=True, unk_token='<unk>'))
    engine.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend('▁'),
                                                 hf.normalizers.Replace(' ', '▁')])
    decoders = [hf.decoders.Replace('▁', ' '), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    engine.decoder = hf.decoders.Sequence([*decoders, hf.decoders.Strip(' ', 1, 0)])
    engine.save(str(other / 'tokenizer.json'))
    (other / 'tokenizer_config.json').write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    return {'wordpiece': load_tokenizer(folder), 'metaspace': load_tokenizer(other)}

def streamed(tokenizer, ids, stops=()):
    """The pieces that a TextStream returns, one a token and one at the end."""
    stream = TextStream(tokenizer, stops=stops)
    return [*(stream.add(i) for i in ids), stream.add(tokenizer.end_id)]

@settings(max_examples=60)
@given(UNICODE | st.text('ab 人之cat the.é😀👍🏽'),
       st.sampled_from(['byte', 'bpe', 'char', 'wordpiece', 'metaspace']), st.text('ab人'))
@example(STORY, 'bpe', '')
@example('\ufeff\ufffd\x00\U0010ffff', 'byte', '')
@example('a 人 a', 'metaspace', 'a')
@example('the cat.', 'wordpiece', 'the')
def test_a_stream_joins_to_the_whole_text_without_half_characters(foreign, text, kind, prompt):
    """After each token all whole characters are out, behind any prompt; any tokenizer. b15"""
    own = {'byte': byte_tokenizer(), 'bpe': BPE, 'char': char_tokenizer({*text, *prompt, 'a'})}
    tokenizer = {**own, **foreign}[kind]
    prompt, ids, out = tokenizer.encode(prompt).tolist(), tokenizer.encode(text).tolist(), ''
    stream, begin = TextStream(tokenizer, prompt), len(tokenizer.decode(prompt))
    for n, token in enumerate(ids, 1):
        out += stream.add(token)
        data = b''.join(map(tokenizer.token_bytes, ids[:n]))
        if kind in own:
            assert out.rstrip('\ufffd') == data.decode(errors='ignore').rstrip('\ufffd'), data
    assert out + stream.add(tokenizer.end_id) == tokenizer.decode(prompt + ids)[begin:]
    assert kind not in own or out == text.rstrip('\ufffd') or out == text

def test_half_a_character_spoils_no_whole_ones_before_it(foreign):
    """Llama's tokenizer decodes a run of bytes as a whole, or not at all."""
    tokenizer = foreign['metaspace']
    ids, stream = tokenizer.encode('人👍👍').tolist()[:-1], TextStream(tokenizer)
    whole = stream.add(*ids) + stream.add(tokenizer.end_id)
    assert whole == ''.join(streamed(tokenizer, ids)) and whole.startswith('人👍\ufffd')

@given(st.lists(st.integers(0, 255), max_size=12))
def test_a_stream_of_any_bytes_joins_to_what_decoding_them_gives(ids):
    """A model may write bytes that are no text. b15"""
    assert ''.join(streamed(byte_tokenizer(), ids)) == byte_tokenizer().decode(ids)

class Pieces:
    """A tokenizer whose token i is the i-th of some pieces of bytes."""
    end_id, end_ids = -1, (-1,)

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return b''.join(self.pieces[i] for i in ids).decode(errors='replace')

@settings(max_examples=100)
@given(st.text('ab中', max_size=12), st.lists(st.text('ab中', min_size=1, max_size=4), max_size=4),
       st.lists(st.integers(0, 99), max_size=20))
@example('aaab', ['aab'], [1, 2, 3])                       # two beginnings: the longer one waits
@example('a中中b', ['中b'], [2, 5, 6])
@example('abb', ['ab', 'b'], [])
@example('abcd', ['abcd', 'bc'], [])                       # bc is complete first
def test_a_text_ends_before_its_first_stop_whatever_the_tokens_are(text, stops, cuts):
    """However the bytes are cut into tokens, the text ends before the stop that is whole first."""
    data = text.encode()
    ends = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    places = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[:min(places)[1]] if places else text
    for pieces in ([data[a:b] for a, b in zip(ends, ends[1:])], [bytes([b]) for b in data]):
        found = ''.join(streamed(Pieces(pieces), range(len(pieces)), stops))
        assert found == expected, f'{found!r} of {text!r}, stops {stops}, pieces {pieces}'

def test_what_may_begin_a_stop_waits_and_nothing_else_does():
    """By hand: text is shown once it can no longer be the beginning of a stop."""
    pieces = ['a\n', 'b', '。', '。', '人之', 'c', 'ab', b'\xe4\xb8']
    tokenizer = Pieces([p if isinstance(p, bytes) else p.encode() for p in pieces])
    found = streamed(tokenizer, range(6), stops=['\n\n', '。人'])
    assert found == ['a', '\nb', '', '。', '', '', '']
    assert streamed(tokenizer, [0], stops=['\n\n']) == ['a', '\n']  # half a stop at the end is text
    assert streamed(tokenizer, [6, 7]) == ['ab', '', '\ufffd']      # and so is half a character

# -----------------------------------------------------------------------------
# Batches

LABELS = ['bad', '好', 'x y']
TAGS = ['O', 'B-per-son', 'I-per-son', 'B-地', 'I-地']
TASKS = {'classify': LABELS, 'tag': TAGS, 'qa': []}

def random_examples(task, lengths, rng):
    """Random ids below 30 with targets of a task; meta says which example it is."""
    examples = []
    for i, n in enumerate(lengths):
        targets = {'classify': int(rng.integers(3)), 'qa': rng.integers(n, size=2).tolist(),
                   'tag': [int(t) if t < 5 else IGNORE_INDEX for t in rng.integers(8, size=n)]}
        examples.append({'ids': rng.integers(30, size=n).tolist(), 'meta': {'i': i},
                         'segments': rng.integers(2, size=n).tolist(), 'targets': targets[task]})
    return examples

def alone(model, example, **more):
    """(logits, loss) of one example, without a batch: the loss is a sum over its targets."""
    batch = {key: torch.tensor(value)[None] for key, value in example.items() if key != 'meta'}
    with torch.no_grad():
        logits, loss = model(**batch, **more)
    return logits[0], loss

def test_a_batch_is_padded_on_the_right_and_says_what_is_real():
    """Ids with the padding token, targets with IGNORE_INDEX; meta is left out. b3"""
    long = {'ids': [7, 8, 9], 'segments': [0, 0, 1], 'targets': [1, 2, 3], 'decoder_ids': [5, 6],
            'meta': {}, 'my_targets': [1, 2]}
    short = {'ids': [5], 'segments': [1], 'targets': [4], 'decoder_ids': [8], 'my_targets': [3]}
    assert {key: t.tolist() for key, t in collate([long, short], 77).items()} == {
        'ids': [[7, 8, 9], [5, 77, 77]], 'attention_mask': [[True] * 3, [True, False, False]],
        'segments': [[0, 0, 1], [1, 0, 0]], 'decoder_ids': [[5, 6], [8, 77]],
        'targets': [[1, 2, 3], [4] + 2 * [IGNORE_INDEX]], 'my_targets': [[1, 2], [3, IGNORE_INDEX]]}
    batch = collate([{'ids': [1, 2], 'targets': 1}, {'ids': [3, 4], 'targets': 0}], 77)
    assert batch.keys() == {'ids', 'targets'} and batch['targets'].tolist() == [1, 0]

@settings(max_examples=20)
@given(st.sampled_from([*TASKS]), st.sampled_from(['bert', 'gpt2', 'llama', 'lstm']),
       st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(1, 5), st.integers(0, 99))
@example('qa', 'bert', [12, 1, 5], 2, 0)
def test_an_answer_depends_neither_on_padding_nor_on_neighbours(task, preset, lengths, size, seed):
    """Answers come in the order of the examples; losses are sums over targets. b1 b2 b3"""
    model = tiny(preset, 30, 12, task=task, n_labels=len(TASKS[task]), dropout=0.5)
    examples = random_examples(task, lengths, np.random.default_rng(seed))
    model.train().trunk.eval()
    found, totals = predict(model, examples, 29, lambda e, logits: (e, logits), batch_size=size)
    assert (model.training, model.head.training) == (True, True) and not any(
        m.training for m in model.trunk.modules()), 'the modes were not restored'
    nats, n, right = 0.0, 0, 0
    model.eval()
    for made, (same, logits) in zip(examples, found, strict=True):
        expected, loss = alone(model, made, num_targets=1)
        targets = torch.tensor(made['targets'])
        nats, n = nats + loss.item(), n + (targets != IGNORE_INDEX).sum().item()
        right += (expected.argmax(dim=-1) == targets).sum().item()
        if task != 'classify':
            n_real = len(made['ids'])
            logits = logits[:n_real] if task == 'tag' else logits[:, :n_real]
        assert same is made, f'{same} in the place of {made}'
        close(logits, expected, 1e-3)
    assert totals['targets'].tolist() == pytest.approx([nats, n, right], rel=1e-3, abs=1e-3)

def test_both_kinds_of_targets_of_bert_are_counted_apart():
    """Hidden tokens and next sentences together have the totals that each kind has alone. b8"""
    model, rng = tiny('bert', 30, 12), np.random.default_rng(0)
    both = random_examples('tag', [9, 3, 7], rng)
    for i, made_example in enumerate(both):
        made_example['next_targets'] = i % 2
    totals = predict(model, both, 29)[1]
    assert totals.keys() == {'targets', 'next_targets'} and totals['next_targets'][1] == 3
    for kind, other in (('targets', 'next_targets'), ('next_targets', 'targets')):
        single = [{key: e[key] for key in e.keys() - {other}} for e in both]
        assert totals[kind].tolist() == pytest.approx(predict(model, single, 29)[1][kind].tolist())

# -----------------------------------------------------------------------------
# Answers

@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=5, unique=True))
def test_the_label_is_the_likeliest_and_all_probabilities_are_given(logits):
    labels = [f'第{i}' for i in range(len(logits))]
    found = DECODERS['classify']([{}], [torch.tensor(logits)], labels)
    p = torch.tensor(logits, dtype=torch.float64).softmax(dim=0).tolist()
    assert found['label'] == labels[p.index(max(p))] or sorted(p)[-2] > max(p) - 1e-6, found
    assert found['probability'] == pytest.approx(max(p), abs=1e-5)
    assert found['probabilities'] == pytest.approx(dict(zip(labels, p)), abs=1e-5)

def test_a_tag_is_that_of_the_first_piece_and_entities_cross_parts():
    """Two examples of one text; the other pieces of a token have other tags and do not count."""
    tokens, tags = ['人民', 'b', 'cd', '😀', 'e'], ['O', *TAGS[1:3], 'I-per-son', 'I-地']
    parts = encode_rows(byte_tokenizer(), 'tag', [{'tokens': tokens}], TAGS, 13)
    logits, rest = [], iter(tags)
    assert len(parts) == 2, f'{len(parts)} examples'
    for part in parts:
        row = torch.zeros(len(part['ids']) + 3, len(TAGS))
        row[:, 3] = 5                                      # B-地 at every other piece
        for place in part['meta']['first']:
            row[place] = F.one_hot(torch.tensor(TAGS.index(next(rest))), len(TAGS))
        logits.append(row)
    assert DECODERS['tag'](parts, logits, TAGS) == {'tokens': tokens, 'tags': tags,
        'entities': [{'kind': 'per-son', 'text': 'b cd 😀', 'first': 1, 'last': 3},
                     {'kind': '地', 'text': 'e', 'first': 4, 'last': 4}]}

@settings(max_examples=60)
@given(st.text('ab 中😀é.\n', max_size=60), st.sampled_from(['byte', 'bpe', 'char']),
       st.sampled_from([12, 24, 80]), st.booleans(), st.sampled_from([-3.0, 0.0, 3.0, 6.0]),
       st.integers(0, 99))
@example('x' * 75, 'byte', 80, False, 0.0, 3)
@example('8   9', 'byte', 24, True, -9.0, 0)
@example('', 'byte', 24, False, 0.0, 0)
@example('ab 中😀é.\n' * 3, 'byte', 24, True, 6.0, 0)       # the last window alone would say ''
def test_a_span_is_the_best_of_all_spans(context, kind, block_size, unanswerable, boost, seed):
    """At most 30 tokens, not only white space; '' only where training had unanswerable rows."""
    tokenizer = BPE if kind == 'bpe' else byte_tokenizer()
    if kind == 'char':
        tokenizer = char_tokenizer({*context, '?'})
    rng, labels = np.random.default_rng(seed), ['no answer'] if unanswerable else []
    row = {'question': '?', 'context': context}
    examples = encode_rows(tokenizer, 'qa', [row], labels, block_size)
    T, logits, spans, no_answer = max(len(e['ids']) for e in examples) + 2, [], [], []
    for made in examples:
        n, meta = len(made['ids']), made['meta']
        row = torch.from_numpy(rng.normal(size=(2, T)) * 4).float()
        row[:, 0] += boost
        row[:, n:] = torch.finfo(torch.float32).min        # padding, as TaskModel marks it
        logits.append(row)
        p, first = row.double().softmax(dim=1).numpy(), meta['first']
        no_answer.append(p[0, 0] * p[1, 0])
        texts = [meta['context'][a:b] for a, b in meta['offsets']]
        for i in range(len(texts)):
            for j in range(i, min(i + 30, len(texts))):
                if not all(text.isspace() for text in texts[i:j + 1]):
                    low, high = meta['offsets'][i][0], meta['offsets'][j][1]
                    text = context[meta['start'] + low:meta['start'] + high].strip()
                    spans.append((p[0, first + i] * p[1, first + j], text))
    found = DECODERS['qa'](examples, logits, labels)
    p, text = max(spans, default=(0.0, ''))
    if unanswerable and min(no_answer) > p:
        p, text = min(no_answer), ''
    assert found['answer'] == text, f'{found}, not {text!r} with {p}; [CLS] has {no_answer}'
    if text:
        assert found['probability'] == pytest.approx(p, rel=1e-3)
        assert context[found['start']:].startswith(text), f'{found} in {context!r}'

def test_a_span_has_at_most_30_tokens():
    """The likeliest first and last token may be the ends of 30 tokens, and not of 31."""
    [made] = encode_rows(byte_tokenizer(), 'qa', [{'question': '?', 'context': 'x' * 60}], [], 80)
    first = made['meta']['first']
    for n, expected in ((30, 30), (31, 1)):
        logits = torch.zeros(2, len(made['ids']))
        logits[1, first], logits[0, first], logits[1, first + n - 1] = 10, 20, 20
        assert len(DECODERS['qa']([made], [logits], [])['answer']) == expected, n

# -----------------------------------------------------------------------------
# Scores

class Oracle(torch.nn.Module):
    """The targets as logits: the largest everywhere; where there is no target, it is wrong."""

    def __init__(self, task, classes, examples=()):
        super().__init__()
        self.weight, self.classes, self.task = torch.nn.Parameter(torch.zeros(1)), classes, task
        arch = {'seq2seq': 'transformer'}.get(task, 'bert')
        self.config = dataclasses.replace(PRESETS[arch], vocab_size=classes, block_size=999)
        self.known = {tuple(e['ids']): e.get('targets') for e in examples}

    def forward(self, ids, targets=None, attention_mask=None, num_targets=None, **inputs):
        known = torch.where(targets == IGNORE_INDEX, self.classes - 1, targets)
        logits = 30.0 * F.one_hot(known, ids.size(1) if self.task == 'qa' else self.classes)
        if self.task == 'masks':
            logits = logits[targets != IGNORE_INDEX]
        return logits, self.weight.sum()

    def encode(self, ids, attention_mask=None, size=None):
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        return KVCache(size, ids, mask)

    def decode(self, ids, cache):
        sources = [row[real].tolist() for row, real in zip(cache.memory, cache.memory_mask.bool())]
        target = torch.tensor([self.known[tuple(source)][cache.length] for source in sources])
        cache.length += 1
        return 30.0 * F.one_hot(target, self.classes)

def oracle_scores(tokenizer, task, rows, labels, size=64):
    examples = encode_rows(tokenizer, task, rows, labels, size)
    classes = tokenizer.n_vocab if task == 'seq2seq' else max(1, len(labels))
    return task_scores(Oracle(task, classes, examples), tokenizer, examples, task, labels)

WORDS = st.text('ab 中é😀\u200b\ufe0fкот.', min_size=1, max_size=6).filter(lambda t: t.split())
TAG = st.sampled_from(TAGS)

@settings(max_examples=15)
@given(st.lists(st.lists(st.tuples(WORDS, TAG), min_size=1, max_size=9), min_size=1, max_size=3),
       st.lists(st.tuples(*[WORDS] * 3), min_size=1, max_size=4, unique_by=lambda x: x[0].strip()),
       st.sampled_from(['byte', 'wordpiece']))
@example([[('the', 'O'), ('\u200b', 'O'), ('\ufe0f', 'O'), ('cat', 'B-地')]], [('a', 'b', '中')],
         'wordpiece')
def test_the_right_targets_score_1_for_every_task_and_any_text(foreign, texts, triples, kind):
    """A task's own targets fed back as logits; tokens that the tokenizer drops are O."""
    tokenizer = foreign.get(kind) or byte_tokenizer()
    rows = [{'text': a, 'text_b': b, 'label': LABELS[len(c) % 3]} for a, b, c in triples]
    found = oracle_scores(tokenizer, 'classify', rows, LABELS)
    assert (found['accuracy'], found['macro_f1']) == (1, 1), found
    rows = []
    for text in texts:
        dropped = lambda token: not len(tokenizer.encode(token))
        tags = ['O' if dropped(token) else tag for token, tag in text]
        rows.append({'tokens': [''.join(token.split()) for token, _ in text], 'tags': tags})
    found = oracle_scores(tokenizer, 'tag', rows, TAGS)
    parts = encode_rows(tokenizer, 'tag', rows, TAGS, 64)
    entities = {tag for part in parts for tag, i in zip(part['meta']['tags'], part['meta']['first'])
                if i >= 0} - {'O'}
    perfect = [1, 1, 1] if entities else [0, 0, 0]
    assert [found[key] for key in ('precision', 'recall', 'f1')] == perfect, f'{found}: {rows}'
    if kind == 'wordpiece':  # it does not write a text as it was
        return
    rows = [{'question': a, 'context': b + c + a, 'answers': [(len(b), c)], 'id': i}
            for i, (a, b, c) in enumerate(triples)]
    rows += [{**rows[0], 'answers': [], 'id': 'none'}]
    found = oracle_scores(tokenizer, 'qa', rows, ['no answer'])
    assert (found['exact_match'], found['f1']) == (1, 1), f'{found}: {rows}'
    rows = [{'source': a, 'target': b + c} for a, b, c in triples]
    found = oracle_scores(tokenizer, 'seq2seq', rows, [])
    assert found['exact_match'] == 1, f'{found}: {rows}'

def test_the_right_targets_score_100_in_bleu_and_1_in_rouge():
    """Five words in three scripts; and hidden tokens are all found by their own targets."""
    rows = [{'source': a, 'target': b * 20}  # longer than other texts are by default
            for a, b in (('a', 'кот and 人之 été '), ('b', 'नमस्ते ok 1 2 '))]
    found = oracle_scores(byte_tokenizer(), 'seq2seq', rows, [], 999)
    assert [found[name] for name in LABELLED['seq2seq'][1]] == pytest.approx([100, 1, 1, 1, 1])
    tokenizer = byte_tokenizer()
    oracle, ids = Oracle('masks', tokenizer.n_vocab), tokenizer.encode(STORY)
    found = sample.masked_accuracy(oracle, tokenizer, ids)
    assert found == {'masked_accuracy': 1}, found

ANY_TAG = st.sampled_from(['O', 'O', 'E-x', 'S-x', *(a + kind for a in ('B-', 'I-') for kind in
                                       ('x', 'y', '人', 'per-son', 'per', '-', 'B-x', 'O', '_'))])

@settings(max_examples=100)
@given(st.lists(st.lists(st.tuples(ANY_TAG, ANY_TAG), max_size=6), min_size=1, max_size=5),
       st.integers(1, 4))
@example([[('O', 'O')]], 1)                                # nothing there, nothing found
@example([[('B-x', 'O')], [('I-x', 'I-x')]], 1)            # an entity ends where its text ends
@pytest.mark.filterwarnings('ignore::sklearn.exceptions.UndefinedMetricWarning')
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_entity_scores_are_those_of_seqeval(rows, size):
    """For any tags, over all texts together; an entity may lie across two parts of a text."""
    rights, guesses = ([[pair[k] for pair in row] for row in rows] for k in (0, 1))
    golds = [[{'meta': {'tags': tags[i:i + size], 'first': [1] * len(tags[i:i + size])}}
              for i in range(0, len(tags), size)] for tags in rights]
    found = SCORES['tag']([{'tags': tags} for tags in guesses], golds)
    theirs = {'precision': precision_score, 'recall': recall_score, 'f1': entity_f1}
    assert found == pytest.approx(
        found | {k: f(rights, guesses) for k, f in theirs.items()}, abs=1e-12)

def test_entities_of_other_schemes():
    found = sample.entities('I-x U-x B-x L-x I-x B-x M-x E-x'.split())
    assert found == [('x', 0, 1), ('x', 1, 2), ('x', 2, 4), ('x', 4, 5), ('x', 5, 8)]

@settings(max_examples=60)
@given(st.lists(st.tuples(*[st.sampled_from(['好', 'bad', 'x', ''])] * 2), min_size=1, max_size=9))
@example([('好', 'bad'), ('好', '好')])                    # a label that was never right
def test_label_scores_are_those_of_scikit_learn(pairs):
    """Macro F1 is the mean over the labels that are there or were guessed."""
    right, guessed = zip(*pairs)
    golds = [[{'meta': {'label': label}}] for label in right]
    found = SCORES['classify']([{'label': label} for label in guessed], golds)
    f1 = f1_score(right, guessed, average='macro', zero_division=0)
    assert found == pytest.approx(
        found | {'accuracy': accuracy_score(right, guessed), 'macro_f1': f1})

def squad_words(text):
    """normalize_answer of SQuAD's evaluate-v2.0.py; then each CJK character is a word."""
    text = ''.join(c for c in text.lower() if c not in set(string.punctuation))
    text = ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())
    cjk = '\u3041-\u3096\u30a1-\u30fa\u3400-\u9fff'
    return re.findall(f'[{cjk}]|[^\\s{cjk}]+', text)

def squad_score(answer, rights):
    """compute_exact and compute_f1 of evaluate-v2.0.py against the best of the right answers."""
    rights = [squad_words(right) for right in rights if squad_words(right)] or [[]]
    words, overlaps = squad_words(answer), []
    for right in rights:
        same = sum((collections.Counter(words) & collections.Counter(right)).values())
        if not words or not right:
            overlaps.append(float(words == right))
        else:
            overlaps.append(2 * same / (len(words) + len(right)))
    return float(words in rights), max(overlaps)

PHRASES = st.lists(st.sampled_from([
    'the', 'a', 'an', 'The', 'cat', 'Cats', 'cat!', 'U.S.', "'s", '-', '北京', '大学', '。', 'こん',
    'カナ', '😀', 'e\u0301', '한국', 'cat的', '3', ' ', '\n', '\u3000']), max_size=7).map(''.join)

@settings(max_examples=100)
@given(st.lists(st.tuples(PHRASES, st.lists(PHRASES, max_size=3)), min_size=1, max_size=4))
@example([('the cat', ['Cat.']), ('', []), ('x', []), ('', ['x']), ('', ['The', 'cat'])])
@example([('北京大学', ['北京']), ('another', ['other']), ('cat cat', ['cat']), ('a', ['!', '北'])])
def test_answer_scores_are_those_of_squad(rows):
    """No case, punctuation or articles; the best of several right answers; the mean over rows."""
    golds = [[{'meta': {'answers': rights}}] for _, rights in rows]
    found = SCORES['qa']([{'answer': text} for text, _ in rows], golds)
    exact, overlap = np.mean([squad_score(*row) for row in rows], axis=0)
    assert found == pytest.approx(found | {'exact_match': exact, 'f1': overlap}, abs=1e-12)

def target_scores(guesses, rights):
    golds = [[{'meta': {'target': text}}] for text in rights]
    return SCORES['seq2seq']([{'target': text} for text in guesses], golds)

PLAIN = st.lists(st.sampled_from(
    ['the', 'cat', 'Cat', 'sat', 'mat.', '3.14', '1,000', "don't", 'x-ray', '5-', 'a,b', '(on)',
     'é', '$5', 'e.g.', 'end', '.', '-', '“q”', '😀', 'İ', '٣,٤', '…', 'Straße', '人，1', 'x中,y',
     'a-\n', '&quot;x&quot;', '&amp;lt;', 'a&gt;b', '<skipped>']), max_size=12).map(' '.join)

@settings(max_examples=60)
@given(st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=6))
@example([('the cat sat on the mat.', 'the cat sat on the mat.')])
@example([('the the the the', 'the cat sat mat.'), ('', 'the cat'), ('on a-\n', 'on a- -')])
def test_bleu_is_that_of_sacrebleu(pairs):
    """13a tokens and exponential smoothing, of the corpus; each CJK character is a word."""
    apart = lambda text: re.sub('([人中，])', r' \1 ', text)
    guesses, rights = zip(*pairs)
    expected = sacrebleu.corpus_bleu([*map(apart, guesses)], [[*map(apart, rights)]]).score
    assert target_scores(guesses, rights)['bleu'] == pytest.approx(expected, abs=1e-6)

@given(*[st.lists(st.sampled_from(['the', 'cat', 'Cat_3', 'mat.', '3.14', "don't", 'x-ray', '!']),
                  max_size=12).map(' '.join)] * 2)
@example('the cat sat on the mat', 'the mat sat on the cat')
@example('', '')
def test_rouge_of_ascii_is_that_of_rouge_score(guess, right):
    names = ['rouge1', 'rouge2', 'rougeL']
    scores, found = RougeScorer(names).score(right, guess), target_scores([guess], [right])
    for name in names:
        assert found[name] == pytest.approx(scores[name].fmeasure), name

@pytest.mark.parametrize('guess, right, expected', [
    ('кот 3', 'номер 3', [0.5, 0, 0.5]), ('été', 'êté', [0, 0, 0]),
    ('नमस्ते दुनिया', 'नमस्ते दुनिया', [1, 1, 1]), ('人之初', '人之初', [1, 1, 1]),
    ('初之人', '人之初', [1, 0, 1 / 3]), ('the 人', 'The人', [1, 1, 1]),
    ('人 之！', '人之初', [0.8, 2 / 3, 0.8]), ('x', '人', [0, 0, 0])], ids=str)
def test_rouge_knows_the_words_of_all_scripts(guess, right, expected):
    """By hand: letters with their marks are words, and so is each CJK character."""
    found = target_scores([guess, guess], [right, right])
    assert [found[name] for name in ('rouge1', 'rouge2', 'rougeL')] == pytest.approx(expected)
    assert target_scores([f' {guess}\n', 'x'], [guess, right])['exact_match'] in (0.5, 1)

def test_spaces_beside_cjk_signs_do_not_count():
    """The tokenizers of BERTs write them; between letters they do."""
    assert target_scores(['二 一 ， 好 ！', 'a b'], ['二一，好！', 'ab'])['exact_match'] == 0.5

# -----------------------------------------------------------------------------
# Attention

@pytest.mark.parametrize('preset', ['gpt2', 'palm', 'llama', 'nano', 'bert', 't5', 'transformer'])
@settings(max_examples=4)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_the_attention_maps_are_those_that_the_fused_kernel_used(preset, lengths, seed):
    """In every layer weights @ values is what came out; no weight ahead or on padding. b3"""
    window = {'window': '4 0'} if preset in ('gpt2', 'llama') else {}
    model, seen = tiny(preset, 30, 12, seed, n_head=4, head_dim=4, **window), {}
    rng = np.random.default_rng(seed)
    batch = collate([{'ids': rng.integers(30, size=n).tolist()} for n in lengths], 0)
    if hasattr(model, 'encode'):
        batch['decoder_ids'] = torch.from_numpy(rng.integers(30, size=(len(lengths), 7)))
    for name, layer in model.named_modules():
        if isinstance(layer, Attention):
            values, outputs = [], []
            layer.v.register_forward_hook(lambda *args, to=values: to.append(args[2]))
            layer.proj.register_forward_hook(lambda *args, to=outputs: to.append(args[1][0]))
            kind = 'cross' if name.endswith('cross') else name.split('.')[0]
            seen.setdefault(kind, []).append((values, outputs))
    plain, maps = model(**batch)[0], sample.attention_maps(model, batch)
    assert maps.keys() == seen.keys()
    real = batch.get('attention_mask', torch.ones_like(batch['ids'], dtype=torch.bool))
    for kind, layers in seen.items():
        for weights, (values, outputs) in zip(maps[kind], layers, strict=True):   # (B, H, T, S)
            v = values[0].unflatten(-1, (-1, 4)).transpose(1, 2)                  # (B, G, S, D)
            y = weights @ v.repeat_interleave(4 // v.size(1), dim=1)
            close(y.transpose(1, 2).flatten(2), outputs[0], 1e-4)
            close(weights.sum(dim=-1), torch.ones(weights.shape[:3]), 1e-4)
            if kind == 'decoder':  # padding may see anything, since nobody reads it
                asks = real[:, None, :, None] if 'decoder_ids' not in batch else 1
                assert not (weights * asks).triu(1).any(), 'a token sees the future'
            if kind != 'decoder' or 'decoder_ids' not in batch:
                assert not (weights[:, :, 0] * ~real[:, None]).any(), f'{kind} sees padding'
    assert torch.equal(model(**batch)[0], plain)

# -----------------------------------------------------------------------------
# The command, most often within this process, because starting Python and torch takes seconds

KINDS = {  # name: preset, task, labels
    'text': ('llama', '', []), 'bytes': ('gpt2', '', []), 'lstm': ('lstm', '', []),
    'masks': ('bert', '', []), 'classify': ('bert', 'classify', LABELS),
    'classify-gpt': ('llama', 'classify', LABELS), 'tag': ('bert', 'tag', TAGS),
    'qa': ('bert', 'qa', []), 'qa-none': ('gpt2', 'qa', ['no answer']),
    'seq2seq': ('transformer', 'seq2seq', []), 'seq2seq-gpt': ('gpt2', 'seq2seq', []), }
CHARACTERS = set(VERSE + 'abc </script>!-é😀[]MASK|')

def made(kind):
    """(model, tokenizer, labels); characters where text is written or guessed, bytes elsewhere."""
    preset, task, labels = KINDS[kind]
    characters = CHARACTERS - {'\n'} if kind == 'masks' else CHARACTERS
    by_characters = kind in ('text', 'lstm', 'masks')
    tokenizer = char_tokenizer(characters) if by_characters else byte_tokenizer()
    model = tiny(preset, tokenizer.n_vocab + 3, 40, seed=2, task=task * (task != 'seq2seq'),
                 n_labels=len(labels), dropout=0.5)
    if kind in ('text', 'bytes'):  # else the windows of a long text would not matter
        model = tiny(preset, tokenizer.n_vocab + 3, 16, seed=2, tied=False)
        model.output.weight.data[tokenizer.end_id] = 0     # it seldom ends
    return model, tokenizer, labels

@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory):
    """A folder with a checkpoint of each kind, as train.py writes them."""
    folder = tmp_path_factory.mktemp('checkpoints')
    for kind, (_, task, labels) in KINDS.items():
        model, tokenizer, _ = made(kind)
        save(folder / f'{kind}.pt', model, tokenizer=tokenizer.to_dict(), task=task, labels=labels)
    return folder

@pytest.fixture
def ask(checkpoints, monkeypatch, capsys):
    """ask(kind, flags...) -> what sample.py writes: .out, .err."""
    def ask(kind, *flags, stdin=''):
        monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(stdin.encode()), newline='\n'))
        path = checkpoints / f'{kind}.pt' if kind in KINDS else kind
        sample.main(['--init_from', str(path), '--device', 'cpu', *map(str, flags)])
        return capsys.readouterr()
    ask.lines = lambda *args, **more: [json.loads(line) if line else None for line in
        ask(*args, '--json', **more).out.removesuffix('\n').split('\n')]
    return ask

def test_text_is_what_generate_yields_and_is_read_from_flag_file_or_pipe(ask, tmp_path):
    """Chinese, and bytes; with a byte order mark and Windows line ends; the prompt comes first."""
    prompt, flags = '性相近，\nabc é😀', ['--seed', 1, '--max_new_tokens', 30, '--num_samples', 2]
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbf' + prompt.replace('\n', '\r\n').encode())
    for kind in ('text', 'bytes', 'lstm'):
        model, tokenizer, _ = made(kind)
        ids = torch.from_numpy(tokenizer.encode(prompt).astype(np.int64)).expand(2, -1)
        rows = written(model, ids, 30, seed=1, end_ids=tokenizer.end_ids,
                       suppressed=suppressed_tokens(model, tokenizer))
        end = tokenizer.end_id
        rows = [row[:row.index(end)] if end in row else row for row in rows]
        expected = '\n---\n'.join(prompt + tokenizer.decode(row) for row in rows) + '\n'
        found = ask(kind, '--start', prompt, *flags)
        assert found.out == expected and found.out.count('---') == 1
        speed = re.fullmatch(r'(\d+) tokens in (\d+\.\d+) s \((\d+\.\d) tok/s\)\n', found.err)
        n, seconds, rate = map(float, speed.groups())
        assert n == sum(map(len, rows)) and abs(n / rate - seconds) < 0.01, found.err  # rounded
        assert ask(kind, '--start', f'FILE:{tmp_path}/a.txt', *flags).out == expected
        assert ask(kind, '--start', '-', *flags, stdin=prompt.replace('\n', '\r\n')).out == expected
        assert ask(kind, '--start', prompt, *flags, '--stream').out == expected
        rows = ask.lines(kind, '--start', prompt, *flags)
        assert [{*row} for row in rows] == [{'prompt', 'text'}] * 2
        assert '\n---\n'.join(row['prompt'] + row['text'] for row in rows) + '\n' == expected
    said = ask('bytes', '--start', '[MASK]<|endoftext|>[SEP', '--max_new_tokens', 1).err
    assert said.startswith('--start: <|endoftext|>, [MASK]: no special token, but text here\n')

def test_a_seed_fixes_the_text_and_the_first_sample_does_not_depend_on_the_others(ask):
    """Without a seed each run is new; an empty prompt begins a document."""
    text = lambda *flags: ask('text', '--start', '', '--max_new_tokens', 40, *flags).out
    assert text('--seed', 0) == text('--seed', 0) != text('--seed', 2)
    assert text('--seed', 1, '--num_samples', 3).startswith(text('--seed', 1) + '---\n')
    assert len({text('--temperature', 5) for _ in range(3)}) == 3 and len(text('--seed', 1)) > 5
    flags = ['--seed', 1, '--temperature', 2, '--max_new_tokens', 9]  # equal lines have own draws
    lines = ask('seq2seq', '--start', '人之\n' * 1002, *flags).out.splitlines()
    assert len({lines[0], lines[1], lines[1000], lines[1001]}) == 4

@pytest.mark.parametrize('kind', ['text', 'seq2seq', 'seq2seq-gpt'])
def test_a_text_is_cut_before_a_stop(ask, kind):
    """At the first of several stops, which is not part of the text."""
    flags = ['--start', '人之', '--seed', 1, '--temperature', 1, '--max_new_tokens', 30]
    name = 'text' if kind == 'text' else 'target'
    whole = ask.lines(kind, *flags)[0][name]
    stops = [whole[9:11], whole[5:7]]
    cut = ask.lines(kind, *flags, '--stop', *stops)[0]
    assert cut[name] == whole[:min(map(whole.find, stops))]
    said = ask(kind, '--start', 'ab' * 9, '--temperature', 0).err  # it writes until it is full
    assert said.startswith('1 texts fill block_size=40') == (kind != 'text'), said

@pytest.mark.parametrize('cut', [True, False])
def test_a_target_of_the_default_length_is_said_to_be_cut(capsys, cut):
    """That is 200 tokens, of a model that would write more."""
    tokenizer = byte_tokenizer()
    model = tiny('t5', tokenizer.n_vocab, 300, seed=2)
    model.output.bias = torch.nn.Parameter(torch.zeros(tokenizer.n_vocab))
    model.output.bias.data[tokenizer.end_id] = -999 if cut else 999
    [[text]] = sample.write_targets(model, tokenizer, [{'ids': [97, tokenizer.end_id]}], Settings())
    assert len(text.ids) == 200 * cut
    assert ('1 texts fill' in capsys.readouterr().err) == cut

@pytest.mark.parametrize('kind', ['text', 'bytes', 'seq2seq', 'seq2seq-gpt'])
def test_beams_give_the_likeliest_texts_best_first(ask, kind):
    """--num_samples of them, with scores in JSON; without it, the best one comes first."""
    flags = ['--start', '人之', '--num_beams', 4, '--max_new_tokens', 7]
    rows = ask.lines(kind, *flags, '--num_samples', 3)
    rows = rows[0]['targets'] if 'targets' in rows[0] else rows
    scores = [row['score'] for row in rows]
    assert len(rows) == 3 and scores == sorted(scores, reverse=True) and scores[0] < 0, rows
    model, tokenizer, _ = made(kind)
    prompt, cache = tokenizer.encode('人之').tolist(), None
    if kind == 'seq2seq':
        cache, prompt = encoded(model, [[*prompt, tokenizer.end_id]]), [tokenizer.end_id]
    elif kind == 'seq2seq-gpt':
        prompt.append(tokenizer.id('[SEP]'))
    suppressed, ids = suppressed_tokens(model, tokenizer), torch.tensor([prompt])
    best = beam_search(model, ids, 4, 7, 1.0, suppressed, tokenizer.end_ids, cache)
    best = [(score, tokenizer.decode(tokens)) for score, tokens in best[0][:3]]
    same_texts([(row['score'], row['text']) for row in rows], best)
    newest = '人之初性本善习相。'  # of a long prompt, 16 - 7 tokens
    one, two = (ask.lines('text', '--start', text, *flags[2:])[0]['text']
                for text in (newest, '近' * 30 + newest))
    assert one == two and ask('text', *flags[:4]).out  # 200 tokens, or as many as fit
    out = ask(kind, *flags).out
    assert ' '.join(out.split()).endswith(' '.join(rows[0]['text'].split())), out

LINES = {  # of each task, and a pair where that is meant
    'masks': ['人[MASK]初', 'a [MASK]bc [MASK]', '[MASK]', 'ab ||| é[MASK]😀'],
    'classify': ['a good film', '不好', 'x ||| 😀 e\u0301', 'longer than forty tokens' * 2],
    'tag': ['Angela Merkel spoke.', '安 民', '😀', 'one two three four five six seven eight nine'],
    'qa': ['Who? ||| The dog won.', '谁？ ||| 北京的小狗 😀 赢了。', '? ||| 8\t9',
           'x ||| many' + ' 汉字, many' * 9],
    'seq2seq': ['twenty one', '人之初', 'a ||| b'], }
ANSWERING = [kind for kind in KINDS if kind not in ('text', 'bytes', 'lstm')]

@pytest.mark.parametrize('kind', ANSWERING)
def test_a_line_in_is_a_line_out_in_order(ask, tmp_path, kind):
    """Empty lines stay, company changes nothing, JSON and text agree; U+0085 ends no line."""
    lines = LINES[KINDS[kind][1] or 'masks']
    flags = ['--max_new_tokens', 9] if 'seq2seq' in kind else []
    each = {line: ask(kind, '--start', line, *flags).out for line in lines}
    assert all(out.count('\n') == 1 for out in each.values())
    assert 'seq2seq' in kind or len({*each.values()}) > 1, each
    many = ['', *lines, '  ', *lines[::-1], '']
    (tmp_path / 'a.txt').write_bytes('\r\n'.join([*many, '']).encode())
    expected = ''.join(each.get(line, '\n') for line in many)
    found = ask(kind, '--start', f'FILE:{tmp_path}/a.txt', *flags)
    assert found.out == expected
    speed = rf'{2 * len(lines)} answers in \d+\.\d+ s \(\d+\.\d a second\)\n'
    assert re.fullmatch(speed, found.err), found.err
    assert ask(kind, '--start', '-', *flags, stdin='\n'.join([*many, ''])).out == expected
    rows = ask.lines(kind, '--start', '\n'.join([*many, '']), *flags)
    assert [row and row['text'] for row in rows] == [line.strip() or None for line in many]
    model, tokenizer, labels = made(kind)
    task = KINDS[kind][1]
    for row in filter(None, rows if task in DECODERS else []):  # the plain model, each alone
        texts = [text.strip() for text in row['text'].split('|||')]
        names = ('question', 'context') if task == 'qa' else ('text', 'text_b')
        inputs = sample.pick(row, 'tokens', 'text') if task == 'tag' else dict(zip(names, texts))
        examples = encode_rows(tokenizer, task, [inputs], labels, 40)
        expected = DECODERS[task](examples, [alone(model, e)[0] for e in examples], labels)
        for key, value in expected.items():
            assert row[key] == (pytest.approx(value, abs=1e-3) if key[:4] == 'prob' else value)
        shown = {'classify': '{label} {probability:.4f}\n', 'qa': '{answer}\n'}
        if task != 'tag':
            assert each[row['text']] == shown[task].format(**row)
        assert task != 'qa' or row['answer'] or kind == 'qa-none', 'all its questions had answers'
        assert task != 'qa' or row['answer'] in texts[1], 'half of a character'
    if 'seq2seq' in kind:  # several texts of a line stand beside each other
        several = lambda text, n: ask.lines(kind, '--start', text, *flags, '--temperature', 1,
                                            '--seed', 1, '--num_samples', n)
        two, three = (several('\n'.join(lines), n) for n in (2, 3))
        assert several(lines[0], 2) == two[:1]
        assert [row['targets'] for row in two] == [row['targets'][:2] for row in three]
    assert sample.format_answer({'answer': ' a\u00a0 b\nc'}) == 'a\u00a0 b c'
    strange = 'a [MASK] ||| b' if kind == 'masks' else 'a \x0c\x85\u2028 ||| b'
    assert len(ask.lines(kind, '--start', f'{strange}\n{strange}', *flags)) == 2

@pytest.mark.parametrize('line, tokens', [
    ('Merkel’s U.S. spoke.', 'Merkel ’s U.S. spoke .'), ('北京 is big', '北 京 is big'),
    ('(e\u0301!)', '( e\u0301 ! )'), ('@user', '@user'), ('a ||| b', 'a | | | b'),
    ('x中y 3.14，b。', 'x 中 y 3.14 ， b 。'), ('\u06dd中', '\u06dd 中'),
    ('❤\ufe0fx👍🏽 न\u094d', '❤\ufe0f x 👍🏽 न\u094d'),
    ('blast(s) [1] f(x)', 'blast ( s ) [ 1 ] f ( x )'), ('ไปเมือง ດີ', 'ไ ป เ ม ื อ ง ດ ີ')], ids=str)
def test_a_tagger_answers_with_tokens_tags_and_entities(ask, line, tokens):
    """Punctuation and each CJK character are tokens; an entity is a part of the line."""
    row = ask.lines('tag', '--start', line)[0]
    assert row['tokens'] == tokens.split()
    entities = get_entities(row['tags'])
    assert [(e['kind'], e['first'], e['last']) for e in row['entities']] == entities
    tagged = ' '.join(f'{token}/{tag}' for token, tag in zip(row['tokens'], row['tags']))
    after = lambda at, token: line.index(token, at) + len(token)
    ends = [*itertools.accumulate(tokens.split(), after, initial=0)]
    named = [f'{kind}: {line[ends[i]:ends[j + 1]].strip()}' for kind, i, j in entities]
    assert ask('tag', '--start', line).out == f"{tagged}\t{'; '.join(named)}".rstrip() + '\n'

def test_each_mask_is_answered_with_its_likeliest_characters(ask):
    """Five or --top_k of them among what is text, with the model's probabilities."""
    model, tokenizer, _ = made('masks')
    alphabet = sorted(CHARACTERS - {'\n'})
    cls, mask, sep = map(tokenizer.id, ('[CLS]', '[MASK]', '[SEP]'))
    ids = [cls, alphabet.index('人'), mask, alphabet.index(' '), mask, sep]
    logits = alone(model, {'ids': ids, 'segments': [0] * 6})[0]
    for flags, k in (([], 5), (['--top_k', 2], 2), (['--top_k', 999], len(alphabet))):
        lines = []
        for place in (2, 4):
            p = logits[place, :len(alphabet)].softmax(dim=0)
            lines.append([(alphabet[i], p[i].item()) for i in p.topk(k).indices.tolist() if p[i]])
        found = ask.lines('masks', '--start', '人[MASK] [MASK]', *flags)[0]['guesses']
        for guesses, expected in zip(found, lines, strict=True):
            assert [text.strip() for text, _ in guesses] == [text.strip() for text, _ in expected]
            assert [p for _, p in guesses] == pytest.approx([p for _, p in expected], abs=1e-4)
    out = ask('masks', '--start', '人[MASK] [MASK]', '--top_k', 2).out
    assert re.fullmatch(r'(\S+ \d\.\d{3}, \S+ \d\.\d{3}( \| )?){2}\n', out), out

def test_a_mask_hides_the_space_before_it_where_tokens_carry_spaces(tmp_path, ask):
    """The ids are those of the whole text with that token replaced; seen on the attention page."""
    text = 'the cat sat on the mat and the dog sat on the cat . '
    tokenizer = bpe_tokenizer([text * 4], 256 + 105 + 40)
    save(tmp_path / 'a.pt', tiny('bert', tokenizer.n_vocab, 10), tokenizer=tokenizer.to_dict())
    start = 'the [MASK] sat  [MASK] ||| the[MASK]'
    rows = shown(ask, tmp_path, tmp_path / 'a.pt', '--start', start)['encoder'][0]
    assert ' '.join(rows) == '[CLS] the [MASK] ␣sat ␣ [MASK] [SEP] the [MASK] [SEP]', rows

# -----------------------------------------------------------------------------
# The command: scores

@pytest.mark.parametrize('kind', ['text', 'bytes', 'lstm'])
def test_a_text_is_scored_as_by_a_slow_loop(ask, tmp_path, kind):
    """Every token but the first is predicted once, in windows; document ends have no bytes."""
    model, tokenizer, _ = made(kind)
    documents, ids, nats = ['人之初。\n', 'abc\nab ' * 9 + '\n'], [], 0.0
    text = '<|endoftext|>\n'.join(documents).replace('\n', '\r\n')
    (tmp_path / 'a.txt').write_bytes(text.encode())
    for text in documents:
        ids += [*tokenizer.encode(text).tolist(), tokenizer.end_id]
    T = model.config.block_size
    for start in range(0, len(ids) - 1, T):
        window = ids[start:start + T + 1]
        log_p = model(torch.tensor([window[:-1]]))[0][0].log_softmax(dim=-1)
        nats -= sum(log_p[t, token].item() for t, token in enumerate(window[1:]))
    loss, size = nats / (len(ids) - 1), len(''.join(documents).encode())
    [found] = ask.lines(kind, '--score', tmp_path / 'a.txt')
    assert found == pytest.approx({'loss': loss, 'perplexity': math.exp(loss),
                                   'bits_per_byte': nats / math.log(2) / size}, rel=1e-4)
    (tmp_path / 'b.txt').write_text('a')
    assert ask.lines(kind, '--score', tmp_path / 'b.txt')[0]['loss'] > 0
    out = 'loss {loss:.4f}, perplexity {perplexity:.2f}, bits per byte {bits_per_byte:.3f}\n'
    assert ask(kind, '--score', tmp_path / 'a.txt').out == out.format(**found)

def test_bert_is_scored_by_its_masked_accuracy(ask, tmp_path):
    """One token at a time is hidden from the others of its window; document ends do not count."""
    tokenizer, right = char_tokenizer('abc人'), []
    model = tiny('bert', tokenizer.n_vocab, 9)
    model.output.bias.data[:4] += 9                        # else no character is ever right
    save(tmp_path / 'a.pt', model, tokenizer=tokenizer.to_dict())
    documents = ['人ab', 'cab人' * 5, 'ac人人b' * 4]
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': d}) for d in documents))
    ids, room = tokenizer.encode(''.join(documents)).tolist(), 7
    cls, mask, sep = map(tokenizer.id, ('[CLS]', '[MASK]', '[SEP]'))
    for start in range(0, len(ids), room):
        window = ids[start:start + room]
        for i, token in enumerate(window):
            row = [cls, *window[:i], mask, *window[i + 1:], sep]
            logits = alone(model, {'ids': row, 'segments': [0] * len(row)})[0]
            right.append(logits[i + 1].argmax().item() == token)
    found = ask.lines(tmp_path / 'a.pt', '--score', tmp_path / 'a.jsonl')
    assert found == [{'masked_accuracy': pytest.approx(np.mean(right))}]
    assert 0.1 < np.mean(right) < 0.9, 'the test would not notice'
    model.output.bias.data[0] += 999                       # it says a; of 2,000 half is right
    places = set()  # all of a window, also where a text has 1,024 windows
    model.register_forward_pre_hook(with_kwargs=True, hook=lambda model, _, inputs: places.update(
        (inputs['ids'] == mask).nonzero()[:, 1].tolist()))
    found = sample.masked_accuracy(model, tokenizer, np.arange(2000) // 1000)
    assert found == {'masked_accuracy': 0.5}
    for n in (room * 1024 - 500, room * 1023 + 1):
        places.clear()
        sample.masked_accuracy(model, tokenizer, np.arange(n) % 2)
        assert places == {*range(1, room + 1)}

QUESTIONS = {'data': [{'paragraphs': [{
    'context': '北京的小狗 😀 won the race.', 'qas': [{'id': '2', 'question': '?', 'answers': []},
        {'id': '1', 'question': '谁?', 'answers': [{'text': '小狗', 'answer_start': 3}]}]}, {
    'context': 'one two three four five six seven eight nine ten, 十一 十二', 'qas': [{'id': '3',
        'question': 'Ten?', 'answers': [{'text': '十一', 'answer_start': 50}]}]}]}]}
LABELLED = {  # a file of each task, with the metrics that DESIGN names
    'classify': ('bad\tfilm\n好\t不好\tb\nbad\tx y\n好\tb\nbad\tcc\n', ['accuracy', 'macro_f1']),
    'tag': ('安\tB-per-son\nMerkel\tI-per-son\n.\tO\n\n' + 'in\tO\nBerlin\tB-地\n' * 8,
            ['precision', 'recall', 'f1']),
    'qa': (json.dumps(QUESTIONS, ensure_ascii=False), ['exact_match', 'f1']),
    'seq2seq': ('twenty one\tx y\n人之初\t人\nabc\tb b\n',
                ['bleu', 'rouge1', 'rouge2', 'rougeL', 'exact_match']), }

@pytest.mark.parametrize('kind', [kind for kind in ANSWERING if kind != 'masks'])
def test_a_score_is_that_of_the_answers_which_start_gives(ask, tmp_path, kind):
    """Each metric of the task, by answering the same inputs one by one; beams too."""
    task, (text, names) = KINDS[kind][1], LABELLED[KINDS[kind][1]]
    (tmp_path / 'a').write_text(text, encoding='utf-8')
    flags = ['--max_new_tokens', 9, '--num_beams', 2] if task == 'seq2seq' else []
    asked = []                                             # lines, and what is right
    if task == 'qa':
        for paragraph in QUESTIONS['data'][0]['paragraphs']:
            for q in paragraph['qas']:
                rights = {'answers': [answer['text'] for answer in q['answers']]}
                asked.append((f"{q['question']} ||| {paragraph['context']}", rights))
    elif task == 'tag':
        for part in text.split('\n\n'):
            tokens, tags = zip(*(line.split('\t') for line in part.splitlines()))
            asked.append((' '.join(tokens), {'tags': tags, 'first': [1] * len(tags)}))
    else:
        for a, *b in (line.split('\t') for line in text.splitlines()):
            pair = (' ||| '.join(b), {'label': a}) if task == 'classify' else (a, {'target': b[0]})
            asked.append(pair)
    answers = [ask.lines(kind, '--start', line, *flags)[0] for line, _ in asked]
    expected = SCORES[task](answers, [[{'meta': meta}] for _, meta in asked])
    [found] = ask.lines(kind, '--score', tmp_path / 'a', *flags)
    assert [*found] == names == [*expected] and found == pytest.approx(expected), answers
    end, start = os.pipe()
    os.write(start, (tmp_path / 'a').read_bytes())
    os.close(start)
    out = ask(kind, '--score', f'/dev/fd/{end}', *flags).out
    pattern = ', '.join(rf'{name} \d+\.\d+' for name in names).replace('_', ' ')
    assert re.fullmatch(pattern + '\n', out), out

def test_the_right_answers_do_not_cut_the_tokens_of_a_score(tmp_path):
    """The answer begins inside of a token: what the model reads is as if nobody knew it."""
    context, q = 'upon a time', {'id': '1', 'question': '?', 'answers': [
        {'text': 'ime', 'answer_start': 8}]}
    (tmp_path / 'a').write_text(json.dumps({'data': [{'paragraphs': [
        {'context': context, 'qas': [q]}]}]}))
    model, read = tiny('bert', BPE.n_vocab, 40, task='qa'), []
    model.register_forward_pre_hook(lambda m, args, batch: read.append(batch), with_kwargs=True)
    sample.score_rows(model, BPE, str(tmp_path / 'a'), 'qa', [], Settings(), 40)
    [right] = encode_rows(BPE, 'qa', [{'question': '?', 'context': context}], [], 40)
    assert read[0]['ids'].tolist() == [right['ids']]
    # Another's model, which says nothing of labels: where [CLS] is likeliest there is no answer.
    model.register_forward_hook(
        lambda m, args, out: (out[0].index_fill(2, torch.tensor([0]), 9.0), out[1]))
    (tmp_path / 'b').write_text((tmp_path / 'a').read_text().replace(
        '[{"text": "ime", "answer_start": 8}]', '[]'))
    for name, ours, right in (('a', False, 0.0), ('b', False, 1.0), ('b', True, 0.0)):
        scores = sample.score_rows(model, BPE, str(tmp_path / name), 'qa', [], Settings(), 40, ours)
        assert scores == {'exact_match': right, 'f1': right}

# -----------------------------------------------------------------------------
# The command: attention

def shown(ask, folder, kind, *flags):
    """{name: (rows, columns, weights)} of the page that --attention writes."""
    path = folder / 'page.html'
    found = ask(kind, '--attention', path, *flags)
    assert found.out == '' and found.err.startswith(f'{path}: '), found
    text = path.read_text(encoding='utf-8')
    begin = text.index('[{"name":')
    data, end = json.JSONDecoder().raw_decode(text[begin:])
    assert '<' not in text[begin:begin + end], 'a token could end the script'
    page = text[:begin] + text[begin + end:]
    alone = re.search(r'https?:|url\(|@import|\bsrc=|\bhref=|fetch\(|XMLHttp|\bimport ', page)
    assert not alone and 'DATA' not in page, f'not alone: {alone}'
    return {m['name']: (m['rows'], m['cols'], torch.tensor(m['weights']) / 1000) for m in data}

def test_a_page_shows_the_tokens_and_the_weights_of_a_text(ask, tmp_path):
    """One file that needs no other; the newest tokens of a long text; tokens that are HTML."""
    model, tokenizer, _ = made('text')
    start = '人</script><!-- \n😀'
    rows, cols, weights = shown(ask, tmp_path, 'text', '--start', start)['decoder']
    assert rows == cols == [*'人</script><!--␣⏎😀'][-16:]
    ids = torch.from_numpy(tokenizer.encode(start).astype(np.int64))[None, -16:]
    close(weights, sample.attention_maps(model, {'ids': ids})['decoder'][:, 0], 6e-4)
    rows = shown(ask, tmp_path, 'bytes', '--start', '中a')['decoder'][0]
    assert rows == ['‹E4›', '‹B8›', '‹AD›', 'a']
    assert os.listdir(tmp_path) == ['page.html']
    for text, says in ((start, '16 tokens, a part\n'), ('人', '1 tokens\n')):
        found = ask('text', '--attention', tmp_path / 'page.html', '--start', text)
        assert found.err.endswith(says)

@pytest.mark.parametrize('kind', ANSWERING)
def test_a_page_shows_what_a_model_reads_and_writes(ask, tmp_path, kind):
    """The frame of two texts; source and greedy target; a decoder's prompt ends in [SEP]."""
    start = {'masks': 'ab[MASK] ||| c', 'seq2seq': 'ab'}.get(kind.split('-')[0], 'ab ||| c')
    flags = ['--max_new_tokens', 99] if kind == 'seq2seq' else []
    page = shown(ask, tmp_path, kind, '--start', start, *flags)
    if kind == 'seq2seq':
        source, target = page['encoder'][0], page['decoder'][0]
        assert source == page['cross'][1] == ['a', 'b', '<|endoftext|>']
        assert target == page['cross'][0] == page['decoder'][1]
        written = ask.lines(kind, '--start', 'ab', *flags)[0]['target']
        assert target[0] == '<|endoftext|>' and len(target) == 1 + len(written) == 40, target
        return
    [(name, (rows, cols, _))] = page.items()
    expected = {'masks': '[CLS]ab[MASK][SEP]c[SEP]', 'tag': '[CLS]ab␣|␣|␣|␣c[SEP]',
                'seq2seq-gpt': 'ab[SEP]'}
    assert ''.join(rows) == expected.get(kind, '[CLS]ab[SEP]c[SEP]') and rows == cols, rows
    assert name == ('encoder' if KINDS[kind][0] == 'bert' else 'decoder')

# -----------------------------------------------------------------------------
# The command: flags and errors

VALUES = {'max_new_tokens': [3], 'num_samples': [2], 'temperature': [30], 'top_k': [1],
          'top_p': [0], 'seed': [9], 'num_beams': [3], 'length_penalty': [9], 'stop': [],
          'stream': [], 'json': []}

@pytest.mark.parametrize('use', ['start', 'score', 'attention'])
@pytest.mark.parametrize('kind', ['text', 'masks', 'classify', 'tag', 'qa', 'seq2seq',
                                  'seq2seq-gpt'])
def test_no_flag_is_ignored(ask, tmp_path, monkeypatch, kind, use):
    """For each kind of model and each use a flag changes the output, or is refused by name."""
    task, page, path = KINDS[kind][1], tmp_path / 'page.html', tmp_path / 'a.jsonl'
    start = LINES[task or 'masks'][0] if kind != 'text' else 'abc'
    draws = use != 'attention' if task == 'seq2seq' else (kind, use) == ('text', 'start')
    base = {'seed': [1], 'temperature': [1], 'max_new_tokens': [12]} if draws else {}
    spell = lambda flags: [word for name in flags for word in (f'--{name}', *flags[name])]
    text = 'abc'
    if draws:
        row = ask.lines(kind, '--start', start, *spell(base))[0]
        text = row.get('target', row['text'])
    if task in ('', 'seq2seq'):  # the target is what is written: any change lowers the score
        path.write_text(json.dumps({'text': text, 'source': start, 'target': text}))
    else:
        path = tmp_path / 'a.txt'
        path.write_text(LABELLED[task][0], encoding='utf-8')
    given = {'start': ['--start', start], 'score': ['--score', path],
             'attention': ['--start', start, '--attention', page]}[use]
    def output(flags):
        flushes = []
        page.unlink(missing_ok=True)
        monkeypatch.setattr(sys.stdout, 'flush', lambda: flushes.append(1))
        out = ask(kind, *given, *spell(flags)).out
        return out, page.read_text(encoding='utf-8') if page.exists() else '', len(flushes)
    plain = output(base)
    for name, value in VALUES.items():
        without = base
        if name in ('num_beams', 'length_penalty') and draws:
            without = {'max_new_tokens': [12], 'json': []}   # with the scores of beams
        if name == 'length_penalty' and draws:
            without |= {'num_beams': [4]}
        value = [text[3:4] or 'x'] if name == 'stop' else value
        before = plain if without == base else output(without)
        try:
            changed = output({**without, name: value}) != before
        except ValueError as e:
            changed = f'--{name}' in str(e)
        if use == 'start' or name not in ('num_beams', 'length_penalty'):  # their score may be 0
            assert changed, f'--{name} changes nothing'

@pytest.mark.parametrize('kind, flags, words', [
    ('text', ['--temperature', 'nan'], ['temperature nan', 'finite']), ('no.pt', [], ['train.py']),
    ('text', ['--stop', ''], ['--stop']), ('text', ['--start', 'ab字c'], ["'字'"]),
    ('text', ['--device', 'mps' if torch.cuda.is_available() else 'cuda'], ['--device', 'auto']),
    ('text', ['--num_beams', 3, '--top_k', 5], ['--num_beams 3', '--top_k', 'leave it out']),
    ('text', ['--num_beams', 3, '--num_samples', 4], ['--num_samples 4', '--num_beams 3']),
    ('text', ['--num_beams', 3, '--stream'], ['--stream', 'leave it out']),
    ('bytes', ['--start', 'a\udcff'], ['\\udcff', 'not UTF-8']),  # what a shell gives
    ('text', ['--start', 'FILE:bad.txt'], ['bad.txt', 'UTF-8', 'byte 2']),
    ('text', ['--score', 'empty.txt'], ['empty.txt', 'no text']),
    ('half.pt', [], ['half.pt']), ('bare.pt', [], ['bare.pt', 'no tokenizer']),
    ('masks', ['--start', 'a[MASK]\n\nabc\na[MASK]'], ['line 3', '[MASK]']),
    ('masks', ['--start', 'a[MASK]' + 'b' * 40], ['44 tokens', 'block_size=40']),
    ('classify', ['--start', 'a\nb ||| c ||| d'], ['line 2', '|||']),
    ('classify', ['--start', '好\ta'], ['has a tab', '--score']),
    ('seq2seq', ['--start', '{"source": "a", "target": "b"}'], ['keys', '--score']),
    ('qa', ['--start', 'Who won?'], ["'Who won?'", 'question ||| context']),
    ('seq2seq', ['--start', 'a\nb\n' + '长' * 14], ['line 3', '43 tokens', '40']),
    *((kind, ['--start', ' \n\n\t'], ['--start', 'empty']) for kind in ANSWERING),
    ('classify', ['--score', 'a.tsv'], ['a.tsv', 'line 2', "'neutral'"]),
    ('seq2seq-gpt', ['--score', 'a.tsv'], ['source and target', 'block_size=40']),
    ('qa', ['--score', 'unanswered.json'], ['unanswered.json', 'question 7']),
    ('text', ['--start', 'a', '--attention', 'nowhere/a.html'], ['nowhere']),
    ('lstm', ['--start', 'a', '--attention', 'a.html'], ['LSTM', 'no attention']),
    ('tag', ['--attention', 'a.html'], ['--start', 'empty']),
], ids=lambda x: x if isinstance(x, str) else '')
def test_what_the_user_can_mend_is_one_line(ask, checkpoints, tmp_path, monkeypatch, capsys, kind,
                                            flags, words):
    """It names the mistake, and comes before anything is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bad.txt').write_bytes(b'ab\xffc')
    (tmp_path / 'empty.txt').write_bytes(b'')
    (tmp_path / 'a.tsv').write_text(f"好\ta\nneutral\tb\n{'a' * 20}\t{'b' * 20}", 'utf-8')
    question = {'paragraphs': [{'context': 'Oslo.', 'qas': [{'id': '7', 'question': 'Which?'}]}]}
    (tmp_path / 'unanswered.json').write_text(json.dumps({'data': [question]}))
    (tmp_path / 'half.pt').write_bytes((checkpoints / 'text.pt').read_bytes()[:5000])
    save(tmp_path / 'bare.pt', tiny('gpt2', 120))
    message = one_line((ValueError, OSError), ask, kind, *flags)
    assert capsys.readouterr().out == ''
    assert all(word in message for word in words), f'{message!r} lacks one of {words}'

def test_the_command_itself_writes_utf8_and_ends_with_status_2(checkpoints, tmp_path):
    """On any console: Chinese through a pipe; --help names each flag; errors are one line."""
    environment = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    found = command('sample.py', '--init_from', checkpoints / 'tag.pt', '--start', '-',
                    cwd=tmp_path, env=environment, input='安 Merkel\n\n😀\n').stdout
    assert re.fullmatch('安/.*\n\n😀/.*\n', found), found
    assert '--top_p 1.5' in refused('sample.py', '--top_p', 1.5, cwd=tmp_path)
    out = command('sample.py', '--help', cwd=tmp_path).stdout
    assert {f.name for f in dataclasses.fields(Settings)} <= {*re.findall(r'--(\w+)', out)}
    words = [sys.executable, ROOT / 'sample.py', '--init_from', checkpoints / 'bytes.pt']
    found = subprocess.run(['bash', '-c', '"$@" | true; exit ${PIPESTATUS[0]}', 'bash', *words],
                           capture_output=True)
    assert found.returncode == 0 and b'Error' not in found.stderr, 'a reader that leaves early'
