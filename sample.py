"""
Use a trained model. --start is the input; the output depends on what the model was trained for.
A GPT continues the text:

    python sample.py --start "The import statement"
    python sample.py --start FILE:poem.txt --num_samples 3 --temperature 0.9 --top_p 0.95 --seed 1
    printf "To be" | python sample.py --start - --stream

Only the text goes to standard output, and a line of three dashes between samples. All other models
answer each line of --start with one line:

    python sample.py --out_dir out-bert --start "The [MASK] statement"          fill each [MASK]
    python sample.py --out_dir out-reviews --start FILE:reviews.txt             label, probability
    python sample.py --out_dir out-squad --start "Who won? ||| The dog won."    answer in a context
    python sample.py --out_dir out-en-de --start "A dog runs." --num_beams 5    translate

Instead of an answer, a score on a file, or a page that shows the attention weights:

    python sample.py --score FILE
    python sample.py --start "The import statement" --attention page.html
"""

import collections
import contextlib
import itertools
import json
import math
import os
import re
import string
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import torch
from torch.nn.utils.rnn import pad_sequence

from model import IGNORE_INDEX, Attention, KVCache, export_huggingface, load, write_file
from prepare_data import (CJK, TASKS, Tokenizer, add_special_tokens, check_flags, check_labels,
                          encode_rows, find_files, flag, load_tokenizer, progress, read_flags,
                          read_pieces, render_token, run, write_ids, write_json)

# -----------------------------------------------------------------------------
# Batches

def collate(examples, pad_id, device='cpu'):
    """
    A list of examples -> a batch, a dict of tensors. Rows of unequal length are padded on the
    right, and attention_mask (B, T) tells which tokens are real. The key `meta` is left out.

        ids    7 8 9        attention_mask    1 1 1
               5 6 PAD                        1 1 0
    """
    fill = {'ids': pad_id, 'decoder_ids': pad_id, 'targets': IGNORE_INDEX}
    batch = {}
    for key in examples[0]:  # in one order: processes add their targets up kind by kind
        if key == 'meta':
            continue
        rows = [torch.as_tensor(example[key], dtype=torch.long) for example in examples]
        batch[key] = torch.stack(rows) if not rows[0].dim() else pad_sequence(
            rows, batch_first=True, padding_value=fill.get(key, 0))
    lengths = torch.tensor([len(example['ids']) for example in examples])
    if lengths.min() < lengths.max():
        batch['attention_mask'] = torch.arange(lengths.max()) < lengths[:, None]
    return {key: t.to(device) for key, t in batch.items()}

@contextlib.contextmanager
def evaluating(model):
    """No dropout and no gradients inside; then as before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

def device_of(model):
    return next(model.parameters()).device

def predict(model, examples, pad_id, postprocess=None, batch_size=64):
    """
    Examples -> (what postprocess(example, logits) returns for each, totals). totals has an array
    (sum of losses in nats, number of targets, how many of them have the largest logit) for each
    kind of targets in the examples. Batches hold examples of about one length.
    """
    results, totals, config = [None] * len(examples), {}, model.config
    if not config.task:  # the logits of a batch have to fit into memory
        batch_size = max(1, min(batch_size, 2 ** 26 // (config.block_size * config.vocab_size)))
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]['ids']))
    for start in range(0, len(order), batch_size):
        progress(f"{start:,} of {len(order):,}")
        chosen = order[start:start + batch_size]
        batch = collate([examples[i] for i in chosen], pad_id, device_of(model))
        goals = {key: batch.pop(key) for key in [*batch] if key.endswith('targets')}
        for kind in goals or ['']:
            goal = {kind: goals[kind], f'num_{kind}': 1} if goals else {}
            with evaluating(model):
                logits, loss = model(**batch, **goal)
            check_finite(logits)
            if goals:
                targets = goals[kind]
                if logits.shape[:-1] != targets.shape:  # BERT: the tokens with a target only
                    targets = targets[targets != IGNORE_INDEX]
                right = (logits.argmax(dim=-1) == targets).sum().item()
                number = (targets != IGNORE_INDEX).sum().item()
                totals[kind] = totals.get(kind, 0) + np.array([loss.item(), number, right])
        if postprocess:
            for i, row in zip(chosen, logits.float().cpu()):
                results[i] = postprocess(examples[i], row)
    progress('')
    return results, totals

def check_finite(logits):
    """Raise ValueError where logits are NaN or infinite: argmax would answer 0 all the same."""
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or too large "
                         "for --dtype")

# -----------------------------------------------------------------------------
# Choosing tokens

def next_logits(model, ids, cache, suppressed):
    """The newest tokens (B, T) -> logits of the next (B, V), those in suppressed (V,) at -inf."""
    logits = model.decode(ids, cache)
    check_finite(logits)
    return logits if suppressed is None else logits.masked_fill(suppressed, -math.inf)

def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """
    logits (B, V), uniform (B,) drawn from [0, 1) -> tokens (B,). A pure function of its arguments.

    temperature divides the logits: below 1 the likely gets likelier; 0 takes the likeliest token.
    top_k       only the k likeliest tokens, exactly k also among equals; 0: all (Fan et al. 2018,
                https://arxiv.org/abs/1805.04833)
    top_p       only the fewest likeliest tokens whose probabilities reach p, the one that crosses p
                included; 1: all (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751)
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, V = logits.double(), logits.size(-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature    # cannot overflow
    order = None
    if top_k or top_p < 1:
        logits, order = logits.topk(min(top_k or V, V))                    # likeliest first
    p = logits.softmax(dim=-1)
    if top_p < 1:
        p = p * (p.cumsum(dim=-1) - p < top_p)                             # the likelier ones' sum
    cumulated = p.cumsum(dim=-1)
    threshold = uniform[:, None].to(p) * cumulated[:, -1:]
    index = (cumulated > threshold).int().argmax(dim=-1)                   # the first above it
    return index if order is None else order.gather(1, index[:, None])[:, 0]

@torch.inference_mode()
def generate(model, ids, max_new_tokens, temperature=0.8, top_k=0, top_p=1.0, seed=0, rows=None,
             suppressed=None, end_ids=(), cache=None):
    """
    Continue ids (B, T): yields the next tokens (B,), at most max_new_tokens times. Row i draws from
    a generator of its own, (seed, rows[i]) [rows: 0, 1, ...], so a sample does not depend on the
    other rows. Tokens in suppressed (V,) bool are never chosen. A row that has chosen one of
    end_ids has ended and repeats it; when all have, the generator returns.

    With the cache each step reads only the newest token. When the window of block_size tokens is
    full, its newer half is read again from position 0 and the older half is forgotten. cache: that
    of an encoded source; prompt and new tokens must then fit into block_size.
    """
    block_size = model.config.block_size
    draws = [np.random.default_rng((seed, row)) for row in rows or range(len(ids))]
    active, tokens = list(range(len(ids))), ids[:, -1]             # active rows have not ended
    window = new = ids[:, -block_size:]
    cache = cache or KVCache(min(block_size, window.size(1) + max_new_tokens))
    for _ in range(max_new_tokens):
        if window.size(1) > block_size:
            window = new = window[:, -max(1, block_size // 2):]
            cache = KVCache(block_size)
        logits = next_logits(model, new, cache, suppressed)                # (B, V)
        logits = logits.cpu() if logits.device.type == 'mps' else logits   # it has no float64
        uniform = torch.tensor([draws[i].random() for i in active], device=logits.device,
                               dtype=torch.float64)
        tokens = tokens.clone()
        tokens[active] = sample_token(logits, uniform, temperature, top_k, top_p).to(ids.device)
        yield tokens
        new = tokens[active, None]                                         # (B, 1)
        window = torch.cat([window, new], dim=1)
        rest = [i for i, token in enumerate(new[:, 0].tolist()) if token not in end_ids]
        if not rest:
            return
        if len(rest) < len(active):
            active, new, window = [active[i] for i in rest], new[rest], window[rest]
            cache.reorder(rest)

@torch.inference_mode()
def beam_search(model, ids, beams, max_new_tokens, length_penalty=1.0, suppressed=None, end_ids=(),
                cache=None):
    """
    The likeliest continuations of ids (B, T): for each row at most `beams` of them, as [(score,
    tokens), ...], best first. Each step extends the `beams` best unfinished texts of a row by every
    token, and keeps the best again. The score is log P(tokens) / length^length_penalty, with the
    end as a token (section 7 of Wu et al. 2016, https://arxiv.org/abs/1609.08144). A row is done
    when no unfinished text could beat its `beams` finished ones by ending now. What has not ended
    after max_new_tokens counts as it is.
    """
    cache = cache or KVCache(ids.size(1) + max_new_tokens)
    texts = {row: [[]] for row in range(len(ids))}         # the beams of each row that is not done
    finished = [[] for _ in ids]
    log_p, new = torch.zeros(len(ids), 1, device=ids.device), ids          # one beam at first
    for length in range(1, max_new_tokens + 1):
        logits = next_logits(model, new, cache, suppressed).float()        # (B beams, V)
        total = log_p[..., None] + logits.log_softmax(dim=-1).unflatten(0, log_p.shape)
        _, width, V = total.shape                                          # (B, beams, V)
        count = min((1 + len(end_ids)) * beams, width * V)                 # so many may end
        best, places = total.flatten(1).topk(count)
        norm, parents, kept, longer = length ** length_penalty, [], [], {}
        for i, (row, before) in enumerate(texts.items()):
            unfinished = []                                                # (log P, beam, tokens)
            for rank, (score, place) in enumerate(zip(best[i].tolist(), places[i].tolist())):
                beam, token = divmod(place, V)
                if score == -math.inf:
                    break
                text = before[beam] if token in end_ids else [*before[beam], token]
                if token not in end_ids and length < max_new_tokens:
                    unfinished.append((score, beam, text))
                elif rank < beams:
                    finished[row].append((score / norm, text))
            finished[row] = sorted(finished[row], key=lambda text: -text[0])[:beams]
            worst = finished[row][-1][0] if len(finished[row]) == beams else -math.inf
            if not unfinished or unfinished[0][0] / norm <= worst:
                continue
            # Every row has as many beams: those that are missing have no probability.
            unfinished = (unfinished + [(-math.inf, *unfinished[0][1:])] * beams)[:beams]
            parents += [i * width + beam for _, beam, _ in unfinished]
            kept.append([score for score, _, _ in unfinished])
            longer[row] = [text for _, _, text in unfinished]
        if not longer:
            break
        # The beams of a source only change places among themselves, unless their number changes.
        changed = width != beams or len(parents) != len(new)
        cache.reorder(torch.tensor(parents, device=ids.device), source=changed)
        texts, log_p = longer, torch.tensor(kept, device=ids.device)       # (B, beams)
        new = torch.tensor(list(longer.values()), device=ids.device)[..., -1].view(-1, 1)
    return finished

# -----------------------------------------------------------------------------
# Text

class TextStream:
    """
    Tokens to text, one at a time. All are decoded again each time, and what is new is shown; but
    half a character waits for its other half, and what may begin a stop text until that is decided.
    `done` after an end or a stop text.
    """

    def __init__(self, tokenizer, prompt=(), stops=()):
        self.tokenizer, self.prompt, self.ids = tokenizer, list(prompt), []
        self.stops, self.text, self.done = stops, '', False
        self.begin = len(tokenizer.decode(self.prompt))                    # of the new text

    def add(self, token):
        """Returns the text that is certain now, but was not before."""
        if self.done:
            return ''
        self.done = token in self.tokenizer.end_ids
        self.ids += [] if self.done else [token]
        text, held = self.tokenizer.decode(self.prompt + self.ids)[self.begin:], 0
        if not self.done:
            text = text.rstrip('\ufffd')
            found = [(text.find(stop) + len(stop), text.find(stop))
                     for stop in self.stops if stop in text]
            if found:  # the stop that is whole first, whatever the tokens are
                text, self.done = text[:min(found)[1]], True
            for stop in self.stops:
                for n in range(1, len(stop)):
                    if text.endswith(stop[:n]):
                        held = max(held, n)
        text = text if self.done else text[:len(text) - held]
        if not self.done and not text.startswith(self.text):
            return ''  # byte tokens: half a character makes those before it unreadable for a while
        new, self.text = text[len(self.text):], text
        return new

    def end(self):
        """Returns the text that was still waiting."""
        return self.add(self.tokenizer.end_id)

def suppressed_tokens(model, tokenizer):
    """(V,) bool: special tokens, which are never text, and rows that no token has; but no ends."""
    hidden = {*tokenizer.special.values()} - {*tokenizer.end_ids}
    suppressed = [i >= tokenizer.n_vocab or i in hidden for i in range(model.config.vocab_size)]
    return torch.tensor(suppressed, device=device_of(model))

def prompt_ids(tokenizer, prompt):
    """The ids that a GPT continues. Some models need a start token, and so does an empty text."""
    ids = tokenizer.encode(prompt).tolist()
    if '<|start|>' in tokenizer.special or not ids:
        ids.insert(0, tokenizer.start_id)
    return ids

class Text(NamedTuple):
    text: str
    ids: list            # its tokens
    score: float = None  # of a beam search

    def to_dict(self):
        return {'text': self.text} | ({} if self.score is None else {'score': self.score})

@torch.inference_mode()
def write_batch(model, tokenizer, prompts, sources, rows, settings, show=lambda text: None):
    """
    Continue prompts of one length; an encoder-decoder reads sources first. Returns for each a list
    of Text: the one drawn by (seed, row), or the best of its beams. show(text) is called with what
    becomes certain of the first. Beams, and texts behind a source, have to fit into one window.
    """
    ids, cache = torch.tensor(prompts, device=device_of(model)), None
    length, beams = settings.max_new_tokens, settings.num_beams
    end = {'suppressed': suppressed_tokens(model, tokenizer), 'end_ids': tokenizer.end_ids}
    if sources or beams > 1:
        length = max(1, min(length, model.config.block_size - ids.size(1)))
    if model.config.arch == 'encdec':
        batch = collate([{'ids': ids} for ids in sources], tokenizer.pad_id, ids.device)
        cache = model.encode(**batch, size=length + 1)
    stream_of = lambda prompt: TextStream(tokenizer, [] if sources else prompt, settings.stop)
    if beams > 1:
        results = [[] for _ in prompts]
        found = beam_search(model, ids, beams, length, settings.length_penalty, cache=cache, **end)
        for result, prompt, texts in zip(results, prompts, found):
            for score, tokens in texts[:settings.num_samples]:
                stream = stream_of(prompt)
                for token in [*tokens, tokenizer.end_id]:
                    stream.add(token)
                result.append(Text(stream.text, tokens, score))
        return results
    temperature, streams = settings.temperature, list(map(stream_of, prompts))
    if temperature is None:
        temperature = 0.0 if sources else 0.8
    for tokens in generate(model, ids, length, temperature, settings.top_k, settings.top_p,
                           settings.seed, rows, cache=cache, **end):
        texts = [stream.add(token) for stream, token in zip(streams, tokens.tolist())]
        show(texts[0])
        if all(stream.done for stream in streams):
            break
    texts = [stream.end() for stream in streams]
    show(texts[0])
    return [[Text(stream.text, stream.ids)] for stream in streams]

def write_targets(model, tokenizer, examples, settings):
    """
    Text to text: num_samples of Text for each source, best first. A decoder-only model reads the
    source as a prompt that ends in [SEP]. Sources of about one length are decoded together.
    """
    encoder, results = model.config.arch == 'encdec', [[] for _ in examples]
    repeat = 1 if settings.num_beams > 1 else settings.num_samples
    size = max(1, 1024 // settings.num_beams)
    length = lambda i: len(examples[i]['ids'])
    for _, group in itertools.groupby(sorted(range(len(examples)), key=length),
                                      key=lambda i: encoder or length(i)):
        group = [(i, k) for i in group for k in range(repeat)]
        for start in range(0, len(group), size):
            progress(f"{sum(map(bool, results)):,} of {len(examples):,} texts")
            chosen = group[start:start + size]
            sources = [examples[i]['ids'] for i, _ in chosen]
            prompts = [[tokenizer.start_id] if encoder else [*ids[:-1], tokenizer.id('[SEP]')]
                       for ids in sources]
            rows = [i * repeat + k for i, k in chosen]
            texts = write_batch(model, tokenizer, prompts, sources, rows, settings)
            for (i, _), found in zip(chosen, texts):
                results[i] += found
    progress('')
    return results

# -----------------------------------------------------------------------------
# Answers. A decoder turns the logits of one row (of all its examples) into an answer, a dict.

def decode_label(examples, logits, labels):
    """(L,) -> the likeliest label."""
    p = dict(zip(labels, logits[0].softmax(dim=-1).tolist()))
    best = max(p, key=p.get)
    return {'label': best, 'probability': p[best], 'probabilities': p}

def entities(tags):
    """
    Tags -> [(kind, first, behind the last)]. As in CoNLL's script (Tjong Kim Sang and De Meulder
    2003) and seqeval, an I-kind that does not continue an entity of its kind begins one.

    >>> entities(['B-person', 'I-person', 'O', 'I-place', 'B-place'])
    [('person', 0, 2), ('place', 3, 4), ('place', 4, 5)]
    """
    found, before, begin = [], 'O', 0
    for i, tag in enumerate([*tags, 'O']):
        if tag[0] != 'I' or before[2:] != tag[2:]:
            if before != 'O':
                found.append((before[2:], begin, i))
            begin = i
        before = tag
    return found

def decode_tags(examples, logits, labels):
    """(T, L) of each part of a text -> the tags of its tokens, at their first pieces; entities."""
    tokens, tags = [], []
    for example, row in zip(examples, logits):
        best, meta = row.argmax(dim=-1).tolist(), example['meta']
        tokens += meta['tokens']
        tags += [labels[best[first]] if first >= 0 else 'O' for first in meta['first']]
    found = [{'kind': kind, 'text': ' '.join(tokens[i:j]), 'first': i, 'last': j - 1}
             for kind, i, j in entities(tags)]
    return {'tokens': tokens, 'tags': tags, 'entities': found}

def decode_span(examples, logits, labels):
    """
    (2, T) of each window of a context -> the span of at most 30 tokens of one window whose first
    and last token are likeliest together (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250).
    A window without the answer points at [CLS]. If the training data had questions without answer
    (labels says so), the answer is '' where [CLS] is likelier in every window.
    """
    best, no_answer = {'probability': -1.0}, 1.0
    for example, row in zip(examples, logits):
        p, meta = row.softmax(dim=-1), example['meta']
        no_answer, offsets = min(no_answer, float(p[0, 0] * p[1, 0])), meta['offsets']
        if not offsets:
            continue
        first, last = p[:, meta['first']:][:, :len(offsets)]
        both = (first[:, None] * last[None, :]).triu().tril(29)            # (begin, end)
        solid = torch.tensor([not meta['context'][a:b].isspace() for a, b in offsets]).int()
        until = solid.cumsum(0)                                # an answer is not only white space
        both = both * (until[None, :] > (until - solid)[:, None])
        begin, end = divmod(int(both.argmax()), len(offsets))
        if both[begin, end] > best['probability']:
            low, high = offsets[begin][0], offsets[end][1]
            text = meta['context'][low:high]
            best = {'answer': text.strip(), 'probability': float(both[begin, end]),
                    'start': meta['start'] + high - len(text.lstrip())}
    if best['probability'] < (no_answer if labels else 0):
        return {'answer': '', 'probability': no_answer}
    return best

DECODERS = {'classify': decode_label, 'tag': decode_tags, 'qa': decode_span}

def answer_rows(model, tokenizer, examples, task, labels, settings):
    """Examples -> (an answer for each row, the examples of each row, totals of `predict`)."""
    rows = itertools.groupby(examples, key=lambda example: example['meta']['row'])
    rows = [list(group) for _, group in rows]
    if task == 'seq2seq':
        written = write_targets(model, tokenizer, examples, settings)
        answers = [{'target': texts[0].text, 'targets': [text.to_dict() for text in texts]}
                   for texts in written]
        return answers, rows, {}
    logits, totals = predict(model, examples, tokenizer.pad_id, lambda example, row: row)
    rest = iter(logits)
    answers = [DECODERS[task](row, list(itertools.islice(rest, len(row))), labels) for row in rows]
    return answers, rows, totals

def masked_example(tokenizer, text, block_size):
    """
    `The [MASK] statement` -> an example; `a ||| b` for two texts. Where tokens carry the space
    before a word, the space before [MASK] is part of the hidden word.
    """
    texts = text.split('|||')
    if len(texts) > 2:
        raise ValueError(f"{text[:60]!r}: write one text, or two as a ||| b")
    parts, hidden = [], ' [MASK]' if tokenizer.name in ('bpe', 'gpt2') else '[MASK]'
    for part in texts:
        ids = []
        for piece in part.strip().replace(hidden, '[MASK]').split('[MASK]'):
            ids += [tokenizer.id('[MASK]'), *tokenizer.encode(piece).tolist()]
        parts.append(ids[1:])
    ids, segments = add_special_tokens(tokenizer, *parts)
    if len(ids) > block_size:
        raise ValueError(f"{text[:60]!r} has {len(ids)} tokens, more than block_size={block_size}: "
                         "shorten it")
    return {'ids': ids, 'segments': segments, 'meta': {'text': text}}

def decode_masks(tokenizer, suppressed, example, logits, k):
    """(T, V) -> for each [MASK] the k likeliest tokens, [(text, probability)]."""
    guesses = []
    for token, row in zip(example['ids'], logits):
        if token == tokenizer.id('[MASK]'):
            p = row.masked_fill(suppressed, -math.inf).softmax(dim=-1)
            p, best = p.topk(min(k, (~suppressed).sum()))
            texts = [tokenizer.decode([i]) for i in best.tolist()]
            guesses.append([(text.strip() or text, value)
                            for text, value in zip(texts, p.tolist()) if value])
    return guesses

# -----------------------------------------------------------------------------
# Scores. Each takes the answers and the examples of all rows. An answer that is right scores 1.

def ratio(a, b):
    return a / b if b else 0.0

def f1(hits, guessed, true):
    """The harmonic mean of precision hits / guessed and recall hits / true."""
    return ratio(2 * hits, guessed + true)

def label_scores(answers, golds):
    """Accuracy, and the mean over all labels of the F1 of finding that label."""
    guesses, right = [a['label'] for a in answers], [g[0]['meta']['label'] for g in golds]
    hits = collections.Counter(g for g, r in zip(guesses, right) if g == r)
    guessed, true = collections.Counter(guesses), collections.Counter(right)
    f1s = [f1(hits[label], guessed[label], true[label]) for label in guessed | true]
    return {'accuracy': hits.total() / len(right), 'macro_f1': float(np.mean(f1s))}

def entity_scores(answers, golds):
    """Precision, recall and F1 of whole entities: both ends and the kind must be right."""
    found, true = set(), set()
    for i, (answer, gold) in enumerate(zip(answers, golds)):
        tags = []
        for meta in (example['meta'] for example in gold):  # a token without a piece counts as O
            tags += [tag if first >= 0 else 'O' for tag, first in zip(meta['tags'], meta['first'])]
        found |= {(i, *entity) for entity in entities(answer['tags'])}
        true |= {(i, *entity) for entity in entities(tags)}
    hits = len(found & true)
    return {'precision': ratio(hits, len(found)), 'recall': ratio(hits, len(true)),
            'f1': f1(hits, len(found), len(true))}

def ngrams(words, n):
    return collections.Counter(zip(*(words[i:] for i in range(n))))

def ngram_f1(guess, right, n):
    """F1 of the n-grams that two lists of words have in common."""
    guess, right = ngrams(guess, n), ngrams(right, n)
    return f1((guess & right).total(), guess.total(), right.total())

def answer_words(text):
    """As SQuAD's script compares answers: no case, punctuation or articles. CJK by characters."""
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return CJK.sub(r' \g<0> ', re.sub(r'\b(a|an|the)\b', ' ', text)).split()

def answer_scores(answers, golds):
    """Exact match, and F1 of the words in common, each against the best of the gold answers."""
    exact, overlap = [], []
    for a, g in zip(answers, golds):
        words, rights = answer_words(a['answer']), map(answer_words, g[0]['meta']['answers'])
        rights = [right for right in rights if right] or [[]]  # no answer: '' is right
        exact.append(words in rights)
        overlap.append(max(words == right or ngram_f1(words, right, 1) for right in rights))
    return {'exact_match': float(np.mean(exact)), 'f1': float(np.mean(overlap))}

def bleu_words(text):
    """sacrebleu's 13a rule: punctuation apart, but not . and , in a number. CJK by characters."""
    text = ' ' + CJK.sub(r' \g<0> ', text) + ' '
    for pattern, apart in [(r'([!-&(-+:-@/\[-`{-~ ])', r' \1 '), (r'([^0-9])([.,])', r'\1 \2 '),
                           (r'([.,])([^0-9])', r' \1 \2'), (r'([0-9])(-)', r'\1 \2 ')]:
        text = re.sub(pattern, apart, text)
    return text.split()

def bleu(guesses, rights):
    """
    BLEU of a corpus, 0 to 100 (Papineni et al. 2002; Post 2018, https://arxiv.org/abs/1804.08771):
    the geometric mean of the shares of its 1- to 4-grams that are in the reference, times a penalty
    where it is shorter. An order without a match counts as half of what the one before would.
    """
    hits, totals, right_length = [0] * 4, [0] * 4, 0
    for guess, right in zip(map(bleu_words, guesses), map(bleu_words, rights)):
        right_length += len(right)
        for n in range(4):
            found = ngrams(guess, n + 1)
            hits[n] += (found & ngrams(right, n + 1)).total()
            totals[n] += found.total()
    if not hits[0] or not totals[3]:
        return 0.0
    smooth, log_sum = 1.0, min(0.0, 1 - right_length / totals[0])
    for hit, total in zip(hits, totals):
        smooth /= 1 if hit else 2
        log_sum += math.log((hit or smooth) / total) / 4
    return 100 * math.exp(log_sum)

ROUGE_WORD = regex.compile(CJK.pattern + r'|(?:(?!' + CJK.pattern + r')[\p{L}\p{M}\p{N}])+')

def rouge(guess, right):
    """ROUGE-1, -2, -L (Lin 2004): F1 of words, word pairs, the longest common subsequence."""
    guess, right = ROUGE_WORD.findall(guess.lower()), ROUGE_WORD.findall(right.lower())
    row = [0] * (len(right) + 1)  # longest common subsequence with the first i words of `right`
    for word in guess:
        diagonal = 0
        for i, other in enumerate(right, 1):
            diagonal, row[i] = row[i], diagonal + 1 if word == other else max(row[i], row[i - 1])
    return [ngram_f1(guess, right, 1), ngram_f1(guess, right, 2),
            f1(row[-1], len(guess), len(right))]

def target_scores(answers, golds):
    """BLEU of the corpus; ROUGE and exact match, the means over the texts."""
    guesses, rights = [a['target'] for a in answers], [g[0]['meta']['target'] for g in golds]
    rouges = np.mean(list(map(rouge, guesses, rights)), axis=0).tolist()
    same = [guess.strip() == right.strip() for guess, right in zip(guesses, rights)]
    return {'bleu': bleu(guesses, rights), 'rouge1': rouges[0], 'rouge2': rouges[1],
            'rougeL': rouges[2], 'exact_match': float(np.mean(same))}

SCORES = {'classify': label_scores, 'tag': entity_scores, 'qa': answer_scores,
          'seq2seq': target_scores}
BEST_SCORE = {'classify': 'accuracy', 'tag': 'f1', 'qa': 'f1', 'seq2seq': 'loss'}  # for best.pt

def task_scores(model, tokenizer, examples, task, labels, settings=None):
    """Scores of labelled examples, with the loss; of text to text without it, decoded greedily."""
    settings = settings or Settings(temperature=0.0, seed=0)
    answers, golds, totals = answer_rows(model, tokenizer, examples, task, labels, settings)
    scores = {}
    for nats, n, _ in totals.values():
        scores['loss'] = nats / max(1, n)
    return scores | SCORES[task](answers, golds)

def text_windows(tokens, block_size):
    """Windows that do not overlap, as examples: every token but the first is predicted once."""
    windows = []
    for start in range(0, len(tokens) - 1, block_size):
        window = tokens[start:start + block_size + 1].astype(np.int64)
        windows.append({'ids': window[:-1], 'targets': window[1:]})
    return windows

def text_scores(nats, predictions, text_bytes):
    """Loss in nats a token, perplexity = exp(loss), and bits per byte, for any tokenizer alike."""
    loss = nats / max(1, predictions)
    return {'loss': loss, 'perplexity': math.exp(min(loss, 700)),
            'bits_per_byte': nats / math.log(2) / max(1, text_bytes)}

def masked_accuracy(model, tokenizer, ids, most=1024):
    """
    How often BERT predicts a token of a text, ids (n,), from all others of its window: one token at
    a time is hidden, `most` of them in a long text, evenly spaced.
    """
    room, examples = model.config.block_size - 2, []
    for i in np.unique(np.linspace(0, len(ids) - 1, min(most, len(ids))).astype(int)).tolist():
        window = ids[i // room * room:][:room].tolist()
        shown, segments = add_special_tokens(tokenizer, window)
        place, targets = i % room + 1, [IGNORE_INDEX] * len(shown)
        targets[place], shown[place] = shown[place], tokenizer.id('[MASK]')
        examples.append({'ids': shown, 'segments': segments, 'targets': targets})
    _, n, right = predict(model, examples, tokenizer.pad_id)[1]['targets']
    return {'masked_accuracy': right / n}

def format_scores(scores):
    """loss 1.8980, perplexity 6.67, bits per byte 2.738"""
    digits = {'perplexity': 2, 'bits_per_byte': 3, 'bleu': 2}
    return ', '.join(f"{name.replace('_', ' ')} {value:.{digits.get(name, 4)}f}"
                     for name, value in scores.items())

def read_text(tokenizer, path):
    """A text file as prepare_data.py reads it: (ids, its size in bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        file, pieces = os.path.join(folder, 'ids'), map(read_pieces, find_files([path]))
        counts = write_ids(file, 'int64', tokenizer, itertools.chain.from_iterable(pieces))
        ids = np.fromfile(file, 'int64')
    if len(ids) < 2:
        raise ValueError(f"--score {path}: no text in it")
    return ids, counts['bytes']

def score_file(model, tokenizer, path, kind, labels, settings):
    """Scores on a file of the format that prepare_data.py reads for what the model is for."""
    if kind == 'text':
        ids, size = read_text(tokenizer, path)
        T, V = model.config.block_size, model.config.vocab_size
        _, totals = predict(model, text_windows(ids, T), tokenizer.pad_id,
                            batch_size=max(1, min(64, 2 ** 25 // (T * V))))
        return text_scores(*totals['targets'][:2], size)
    if kind == 'masks':
        ids, _ = read_text(tokenizer, path)
        return masked_accuracy(model, tokenizer, ids[ids != tokenizer.end_id])
    rows = [row for file in find_files([path]) for row in TASKS[kind].read(file)]
    if not rows:
        raise ValueError(f"--score {path}: no rows in it")
    check_labels(kind, rows, labels)
    # The answers of a question may not guide how its context is cut into tokens.
    questions = [{key: row[key] for key in row if key != 'answers'} for row in rows]
    examples = encode_rows(tokenizer, kind, questions, labels, model.config.block_size)
    for meta in (example['meta'] for example in examples):
        meta['answers'] = [text for _, text in rows[meta['row']].get('answers', [])]
    scores = task_scores(model, tokenizer, examples, kind, labels, settings)
    scores.pop('loss', None)
    return scores

# -----------------------------------------------------------------------------
# Attention

def attention_maps(model, batch):
    """
    A batch -> the attention weights of each kind of layer: {'encoder' | 'decoder' | 'cross':
    (layers, B, H, T, S)}. Raises ValueError where the model has no attention.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, Attention)}
    if not layers:
        raise ValueError("an LSTM has no attention to show")
    for layer in layers.values():
        layer.recorded = []
    with evaluating(model):
        model(**batch)
    maps = collections.defaultdict(list)
    for path, layer in layers.items():
        kind = 'cross' if path.endswith('cross') else 'encoder' if 'encoder.' in path else 'decoder'
        maps[kind].append(layer.recorded[0])
        layer.recorded = None
    return {kind: torch.stack(weights).float().cpu() for kind, weights in maps.items()}

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Attention weights</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark } /* Canvas and CanvasText are then white and black, or reversed */
body { max-width: 80rem; margin: auto; padding: 1rem; font: 1rem/1.4 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.5rem }
label { display: inline-block; margin-right: 1rem } button, select { font: inherit }
output { display: block; min-height: 2.8em; margin: 1rem 0 .5rem; overflow-wrap: anywhere }
section { max-height: max(18rem, 100dvh - 13rem); overflow: auto; scroll-padding-top: 9rem }
table { --cell: round(clamp(1.2rem, (min(100vw, 80rem) - 10rem) / var(--n), 3rem), 1px);
        --gaps: linear-gradient(90deg, transparent calc(100% - 2px), Canvas 0) 0 0 / var(--cell);
        border-spacing: 2px; font-size: min(.9rem, var(--cell) * .7); line-height: 1.2 }
thead, th { position: sticky; left: 0; z-index: 1; padding: 0; background: Canvas }
thead { top: 0; z-index: 2 }
td { padding: 0; display: grid; grid: minmax(var(--cell), auto) / repeat(var(--n), var(--cell)) }
td span { margin: auto; font-size: clamp(0px, (var(--cell) - 1.7rem) * 99, .66rem) } /* or none */
button, bdi { overflow: hidden; text-overflow: ellipsis; white-space: pre }
bdi { place-self: end center; writing-mode: vertical-rl; padding: .4em 0; max-height: 8rem }
button { display: block; width: 100%; max-width: 7rem; height: var(--cell); padding: 0 .4em;
         border: 0; background: none; text-align: right }
tbody tr:is(:hover, :has(:focus-visible, [aria-pressed=true])) > * { outline: 2px solid }
[aria-pressed=true] { color: Canvas; background: CanvasText }
</style>
<h1>Attention weights</h1>
<p><label>Attention <select id="kind"></select></label>
<label>Layer <select id="layer"></select></label> <label>Head <select id="head"></select></label>
<output id="said" aria-live="polite"></output>
<section><table id="map"><thead><tr data-said="Point at, tap or Tab to a row. A click keeps it.">
<th><td id="cols"></thead><tbody id="rows"></table></section>
<script id="data" type="application/json">DATA</script>
<script>
const $ = id => document.getElementById(id), maps = JSON.parse($('data').textContent)
const add = (parent, tag) => parent.appendChild(document.createElement(tag))
const fill = (select, names) => select.replaceChildren(...names.map((name, i) =>
  new Option(name, i, false, i === select.selectedIndex)))  // the same place stays chosen
let kept = 0  // the row that a click has kept; row 0, that of the headings, stands for none

function draw() {
  const {rows, cols, weights} = maps[$('kind').value]
  fill($('layer'), weights.map((_, i) => i + 1))
  const heads = weights[$('layer').value]
  fill($('head'), ['mean of all', ...heads.map((_, i) => i + 1)])
  const head = $('head').value - 1, chosen = head < 0 ? heads : [heads[head]]
  const mean = rows.map((_, i) => cols.map((_, j) =>
    chosen.reduce((sum, weights) => sum + weights[i][j], 0) / chosen.length / 1000))
  const most = Math.max(...mean.map(row => Math.max(...row)))  // has the strongest colour
  $('map').style.setProperty('--n', cols.length)
  for (const id of ['rows', 'cols']) $(id).replaceChildren()
  for (const text of cols) add($('cols'), 'bdi').textContent = text
  mean.forEach((row, i) => {
    const tr = add($('rows'), 'tr'), isolate = text => `\u2068${text}\u2069`
    Object.assign(add(add(tr, 'th'), 'button'), {textContent: rows[i], dir: 'auto'})
    const td = add(tr, 'td'), stops = row.map((w, j) =>
      `rgb(59 130 246 / ${Math.sqrt(w / most).toFixed(2)}) 0 ${(j + 1) / cols.length * 100}%`)
    td.style.background = `var(--gaps), linear-gradient(90deg, ${stops})`
    if (cols.length <= 40) for (const w of row) add(td, 'span').textContent = w ? w.toFixed(2) : ''
    const best = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 5).filter(j => row[j])
    tr.dataset.said = `${isolate(rows[i])} attends to: ` +
      best.map(j => `${isolate(cols[j])} ${row[j].toFixed(cols.length > 40 ? 3 : 2)}`).join(', ')
  })
  point({target: document.body})
}

function point({type, target}) {
  const at = target.closest('tr')?.rowIndex || 0
  if (type === 'click' && at) kept = at === kept ? 0 : at
  document.querySelectorAll('button').forEach((button, i) => button.ariaPressed = i + 1 === kept)
  $('said').textContent = ($('map').rows[at || kept] || $('map').rows[0]).dataset.said
}
fill($('kind'), maps.map(map => map.name))
onchange = draw
for (const type of ['pointerover', 'focusin', 'click']) addEventListener(type, point)
draw()
</script>
"""

def write_attention(model, tokenizer, prompt, kind, labels, settings):
    """The page that --attention names. An encoder-decoder shows the target that it writes, too."""
    config, text = model.config, prompt if kind == 'text' else prompt.strip()
    if kind != 'text' and '\n' in text:
        raise ValueError("--attention shows one line: leave the other lines of --start out")
    example = examples_of(tokenizer, kind, text, labels, config.block_size)[0]
    ids = decoder_ids = example['ids'] = example['ids'][-config.block_size:]
    if kind == 'seq2seq' and config.arch != 'encdec':
        ids[-1] = tokenizer.id('[SEP]')
    if config.arch == 'encdec':
        start = tokenizer.start_id
        written = write_batch(model, tokenizer, [[start]], [ids], [0], settings)[0][0]
        decoder_ids = example['decoder_ids'] = [start, *written.ids]
    source, target = ([render_token(tokenizer, i) for i in row] for row in (ids, decoder_ids))
    maps = attention_maps(model, collate([example], tokenizer.pad_id, device_of(model)))
    data = [{'name': name, 'rows': source if name == 'encoder' else target,
             'cols': target if name == 'decoder' else source,
             'weights': (1000 * weights[:, 0]).round().int().tolist()}  # (layers, H, T, S)
            for name, weights in maps.items()]
    data = json.dumps(data, ensure_ascii=False, separators=(',', ':')).replace('<', r'\u003c')
    write_file(settings.attention, lambda f: f.write(PAGE.replace('DATA', data, 1).encode()))
    print(f"{settings.attention}: {len(ids)} tokens, {config.n_layer} layers of "
          f"{config.n_head} heads", file=sys.stderr)

# -----------------------------------------------------------------------------
# The script

@dataclass
class Settings:
    """The flags of this script."""
    start: str = flag('', 'the input: a text, FILE:path, or - for standard input')
    out_dir: str = flag('out', 'the folder that train.py wrote')
    init_from: str = flag('', 'or a checkpoint, a Hugging Face folder, or a name on the hub')
    num_samples: int = flag(1, 'how many texts; with beams, so many of the best', low=1)
    max_new_tokens: int = flag(200, 'tokens in a text, at most', low=1)
    temperature: float = flag(None, '0 takes the likeliest token, 1 draws as the model says [0.8; '
                                    'text to text: 0]', low=0, high=1e6, kind=float)
    num_beams: int = flag(1, 'above 1: search the likeliest text by beams', low=1, high=4096)
    length_penalty: float = flag(1.0, 'of beams: divide log P by length^this', low=0, high=100)
    top_k: int = flag(0, 'the k likeliest tokens; 0: all. For [MASK]: how many to show', low=0)
    top_p: float = flag(1.0, 'the fewest tokens that reach this probability', low=0, high=1)
    stop: list = flag([], 'texts at which to stop')
    seed: int = flag(-1, 'the same seed writes the same text; -1: a new one every time', low=-1)
    stream: bool = flag(False, 'print text as it is generated, one sample after the other')
    score: str = flag('', 'a file to score: a text, or labelled rows as prepare_data.py reads them')
    json: bool = flag(False, 'print JSON objects, one a line')
    export: str = flag('', 'write the model as a Hugging Face folder')
    attention: str = flag('', 'write an HTML page that shows the attention weights for --start')
    device: str = flag('auto', 'where to compute', choices=('auto', 'cpu', 'cuda', 'mps'))
    dtype: str = flag('auto', 'of the weights; auto: bfloat16 to generate on a GPU, else float32',
                      choices=('auto', 'float32', 'bfloat16', 'float16'))

    def __post_init__(self):
        check_flags(self)
        if self.num_beams > 1 and (self.temperature or self.top_k or self.top_p < 1):
            raise ValueError(f"--num_beams {self.num_beams} searches for the likeliest text, and "
                             "--temperature, --top_k and --top_p draw one: leave one of them out")
        if 1 < self.num_beams < self.num_samples:
            raise ValueError(f"--num_samples {self.num_samples}: a search with --num_beams "
                             f"{self.num_beams} finds no more texts than beams: raise it")

# The flags that each use reads, beside those that say which model and where it computes.
DRAWING = ' max_new_tokens temperature top_k top_p num_beams length_penalty stop seed'
FLAGS = {'text': 'start json stream num_samples' + DRAWING, 'masks': 'start json top_k',
         'seq2seq': 'start json num_samples' + DRAWING,
         'score': 'score json', 'score seq2seq': 'score json' + DRAWING,
         'export': 'export', 'attention': 'attention start max_new_tokens'}

def check_use(given, settings, kind, arch):
    """Raise ValueError for a flag that would be ignored."""
    use = next((name for name in ('export', 'attention', 'score') if getattr(settings, name)), kind)
    use = 'score seq2seq' if (use, kind) == ('score', 'seq2seq') else use
    read = FLAGS.get(use, 'start json') + ' out_dir init_from device dtype'
    unread = set(given) - set(read.split())
    if use == 'attention' and arch != 'encdec':
        unread |= set(given) & {'max_new_tokens'}
    beside = {'length_penalty'} if settings.num_beams == 1 else {'seed', 'stream'}
    unread |= set(given) & (beside | {'stream'} if settings.json else beside)
    if unread:
        raise ValueError(f"--{min(unread)} changes nothing here ({use}): leave it out")

def open_model(path, device='cpu', **changes):
    """`load` of model.py, and the tokenizer where a Hugging Face folder has one: a third value."""
    model, checkpoint = load(path, device, **changes)
    if 'folder' in checkpoint:  # a Hugging Face model
        with contextlib.suppress(FileNotFoundError):
            checkpoint['tokenizer'] = load_tokenizer(checkpoint['folder']).to_dict()
    if checkpoint.get('not_read'):
        print(f"{path}: not read: {', '.join(checkpoint['not_read'])}", file=sys.stderr)
    saved = checkpoint.get('tokenizer')
    return model, checkpoint, Tokenizer.from_dict(saved) if saved else None

def export(model, tokenizer, labels, folder):
    """Write model and tokenizer as a Hugging Face folder, without rows that were added to GPT-2."""
    config, size, ends = model.config, model.config.vocab_size, tokenizer.end_ids
    if tokenizer.name == 'gpt2' and config.arch == 'gpt':
        size = min(size, tokenizer.pad_id)  # the first token that was added
    files = tokenizer.export_files(size)
    first = 'decoder_start_token_id' if config.arch == 'encdec' else 'bos_token_id'
    fields = {'eos_token_id': ends if len(ends) > 1 else ends[0], first: tokenizer.start_id}
    if tokenizer.pad_id < size:
        fields['pad_token_id'] = tokenizer.pad_id
    if labels:
        fields['id2label'] = dict(enumerate(labels))
        fields['label2id'] = {label: i for i, label in enumerate(labels)}
    export_huggingface(model, folder, size, **fields)
    for name, data in files.items():
        write_json(os.path.join(folder, name), data)

def find_device(name):
    """auto -> the best device there is. Raises ValueError where the machine lacks the one named."""
    found = {'cuda': torch.cuda, 'mps': torch.backends.mps, 'cpu': torch.cpu}
    present = [device for device in found if found[device].is_available()]
    if name not in ('auto', *present):
        raise ValueError(f"--device {name}: this machine or this torch has none: use --device auto")
    return present[0] if name == 'auto' else name

def read_start(start):
    """The text that --start names."""
    if start == '-':
        data = sys.stdin.buffer.read()
    elif start.startswith('FILE:'):
        data = Path(start.removeprefix('FILE:')).read_bytes()
    else:
        return start
    try:
        return data.decode('utf-8-sig').replace('\r\n', '\n').replace('\r', '\n')
    except UnicodeDecodeError as e:
        raise ValueError(f"--start {start} is not UTF-8 at byte {e.start}: convert it") from None

def report(started, n, what, rate):
    """To standard error, how fast it was."""
    seconds = time.perf_counter() - started
    print(f"{n} {what} in {seconds:.2f} s ({n / seconds:.1f} {rate})", file=sys.stderr)

def print_texts(model, tokenizer, prompt, settings):
    """Print the samples to standard output, and the speed to standard error."""
    started, ids, n = time.perf_counter(), prompt_ids(tokenizer, prompt), settings.num_samples
    live = settings.stream
    show = lambda text: print(text, end='', flush=True) if live else None
    if settings.num_beams > 1:  # one window: of a long prompt the newest half
        room = model.config.block_size - min(settings.max_new_tokens, model.config.block_size // 2)
        ids, n = ids[-room:], 1
    printed = []
    for rows in [[row] for row in range(n)] if live else [range(n)]:
        show('---\n' * bool(printed) + prompt)
        texts = write_batch(model, tokenizer, [ids] * len(rows), [], rows, settings, show)
        for found in itertools.chain(*texts):
            if settings.json:
                print(json.dumps({'prompt': prompt} | found.to_dict(), ensure_ascii=False))
            else:
                print('' if live else '---\n' * bool(printed) + prompt + found.text)
            printed.append(found)
    report(started, sum(len(found.ids) for found in printed), 'tokens', 'tok/s')

WORDS = regex.compile(CJK.pattern + r'|[\p{L}\p{N}\p{M}_@#](?:(?!' + CJK.pattern
                      + r')\S)*(?<=[\p{L}\p{N}\p{M}_])|\S')

def examples_of(tokenizer, kind, line, labels, block_size):
    """A line that a user wrote -> the examples that the model reads."""
    if kind == 'text':
        return [{'ids': prompt_ids(tokenizer, line)}]
    if kind == 'masks':
        return [masked_example(tokenizer, line, block_size)]
    if kind == 'tag':
        row = {'tokens': WORDS.findall(line)}
    elif kind == 'seq2seq':
        row = {'source': line}
    else:
        names, least, form = ('text', 'text_b'), 1, "one text, or two as a ||| b"
        if kind == 'qa':
            names, least, form = ('question', 'context'), 2, "question ||| context"
        texts = [text.strip() for text in line.split('|||')]
        if not all(texts) or not least <= len(texts) <= 2:
            raise ValueError(f"{line[:60]!r}: write {form}")
        row = dict(zip(names, texts))
    return encode_rows(tokenizer, kind, [row], labels, block_size)

def format_answer(answer):
    """An answer as one line of text."""
    if 'guesses' in answer:
        plain = lambda text: text if text.isprintable() else repr(text)
        return ' | '.join(', '.join(f'{plain(text)} {p:.3f}' for text, p in guesses)
                          for guesses in answer['guesses'])
    if 'label' in answer:
        return f"{' '.join(answer['label'].split())} {answer['probability']:.4f}"
    if 'tags' in answer:
        tagged = ' '.join(map('/'.join, zip(answer['tokens'], answer['tags'])))
        found = '; '.join(f"{e['kind']}: {e['text']}" for e in answer['entities'])
        return f'{tagged}\t{found}'.rstrip()
    if 'targets' in answer:
        return '\n'.join(' '.join(target['text'].split()) for target in answer['targets'])
    return ' '.join(answer['answer'].split())

def print_answers(model, tokenizer, prompt, kind, labels, settings):
    """Answer each line of the prompt with a line on standard output; an empty line stays empty."""
    started, examples = time.perf_counter(), []
    lines = [line.strip() for line in prompt.removesuffix('\n').split('\n')]
    for n, line in enumerate(lines):
        if not line:
            continue
        try:
            if kind == 'masks' and '[MASK]' not in line:
                raise ValueError(f"{line[:60]!r} has no [MASK]: write one for a word to predict")
            made = examples_of(tokenizer, kind, line, labels, model.config.block_size)
        except ValueError as e:
            raise ValueError(f"line {n + 1}: {e}" if len(lines) > 1 else str(e)) from None
        for example in made:
            example['meta']['row'] = n
        examples += made
    if not examples:
        raise ValueError("--start is empty: give a text, FILE:path, or - for standard input")
    if kind == 'masks':
        suppressed = suppressed_tokens(model, tokenizer).cpu()
        suppressed[tokenizer.end_ids] = True
        best = lambda example, logits: {'guesses': decode_masks(
            tokenizer, suppressed, example, logits, settings.top_k or 5)}
        answers, _ = predict(model, examples, tokenizer.pad_id, best, batch_size=8)
    else:
        answers, _, _ = answer_rows(model, tokenizer, examples, kind, labels, settings)
    rest = iter(answers)
    for line in lines:
        if not line:
            print()
        elif settings.json:
            print(json.dumps({'text': line} | next(rest), ensure_ascii=False))
        else:
            print(format_answer(next(rest)))
    report(started, len(answers), 'answer' + 's' * (len(answers) != 1), 'a second')

def main(argv):
    given = read_flags(argv, __doc__, {'flags': Settings})
    settings = Settings(**given)
    device = find_device(settings.device)
    if settings.seed < 0:
        settings.seed = int.from_bytes(os.urandom(4), 'little')
    path = settings.init_from or settings.out_dir
    if not settings.init_from and not os.path.exists(path):
        raise FileNotFoundError(f"there is no folder {path}: train a model first, with python "
                                "train.py")
    model, checkpoint, tokenizer = open_model(path, device)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer: it cannot read or write text")
    labels = checkpoint.get('labels', [])
    usual = {'gpt': 'text', 'lstm': 'text', 'bert': 'masks', 'encdec': 'seq2seq'}
    kind = checkpoint.get('task') or usual[model.config.arch]
    check_use(given, settings, kind, model.config.arch)
    if settings.export:
        export(model, tokenizer, labels, settings.export)
        print(f"{settings.export}: a model and its tokenizer, as transformers loads them")
        return
    half = device == 'cuda' and not (settings.score or settings.attention) and \
        torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = ('bfloat16' if half else 'float32') if settings.dtype == 'auto' else settings.dtype
    model = model.to(getattr(torch, dtype)).eval()
    prompt = read_start(settings.start)
    if settings.attention:
        write_attention(model, tokenizer, prompt, kind, labels, settings)
    elif kind == 'masks' and 'output.bias' in checkpoint.get('new', []):
        raise ValueError(f"{path} is an encoder without a head, so it has no output: fine-tune it "
                         f"first, with python train.py --init_from {path}")
    elif settings.score:
        scores = score_file(model, tokenizer, settings.score, kind, labels, settings)
        print(json.dumps(scores) if settings.json else format_scores(scores))
    elif kind == 'text':
        print_texts(model, tokenizer, prompt, settings)
    else:
        print_answers(model, tokenizer, prompt, kind, labels, settings)

if __name__ == '__main__':
    run(main)
