"""
Ask a trained model. --start is what you say; what comes back depends on what the model was trained for. A GPT goes on
writing:

    python sample.py --start "The import statement"
    python sample.py --start FILE:poem.txt --num_samples 3 --temperature 0.9 --top_p 0.95 --seed 1
    printf "To be" | python sample.py --start - --stream

On standard output stands the text and nothing else; several samples are separated by a line of three dashes. A model
sees at most block_size tokens: when its window is full it forgets the older half and goes on. Writing ends after
--max_new_tokens, at a --stop text (which is not printed), or where the model ends the document.

The others answer each line of --start with a line:

    python sample.py --out_dir out-bert --start "The [MASK] statement"         the best guesses for each [MASK]
    python sample.py --out_dir out-reviews --start FILE:reviews.txt            a label and its probability
    python sample.py --out_dir out-squad --start "Who won? ||| The dog won."   the answer, cut from the text behind the |||

Who looked at whom, instead of an answer, on a page to explore:

    python sample.py --start "The import statement" --attention page.html

    choose              logits -> the next token: greedy, temperature, top-k, top-p
    generate            ids -> new ids, one at a time, with a cache
    TextStream          ids -> text, never half a character
    ask                 examples -> logits, in batches; ANSWERS and SCORES make of them what a task wants
    attention_maps      who looks at whom while a model reads; attention_page, attention_picture: the same to look at
    text_loss           how well a model predicts a text: loss, perplexity, bits per byte; hidden_scores: the same for BERT

References:
    [1] Fan et al. 2018, Hierarchical Neural Story Generation (top-k), https://arxiv.org/abs/1805.04833
    [2] Holtzman et al. 2019, The Curious Case of Neural Text Degeneration (top-p), https://arxiv.org/abs/1904.09751
    [3] Rajpurkar et al. 2016, SQuAD, https://arxiv.org/abs/1606.05250
    [4] Tjong Kim Sang and De Meulder 2003, CoNLL-2003 shared task: entities count as a whole
    [5] Salazar et al. 2020, Masked Language Model Scoring (pseudo-perplexity), https://arxiv.org/abs/1910.14659
    [6] Wu et al. 2016, Google's Neural Machine Translation System (beams, length), https://arxiv.org/abs/1609.08144
    [7] Papineni et al. 2002, BLEU; Post 2018, A Call for Clarity in Reporting BLEU Scores, https://arxiv.org/abs/1804.08771
    [8] Lin 2004, ROUGE
"""

import codecs
import collections
import contextlib
import io
import itertools
import json
import math
import os
import re
import string
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
import regex
import torch

from model import IGNORE, Attention, Output, export_huggingface, load, write_file
from prepare_data import (
    CJK,
    SHOTS,
    TASKS,
    check_flags,
    check_labels,
    encode,
    encode_rows,
    export_tokenizer,
    find_files,
    flag,
    frame,
    gpt2_tokenizer,
    load_tokenizer,
    progress,
    read_documents,
    read_flags,
    run,
    spell_token,
    tokenizer_from_dict,
    tokenizer_to_dict,
    write_json,
)

# -----------------------------------------------------------------------------
# Choosing the next token


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """
    logits (B, V), uniform (B,) drawn from [0, 1) -> tokens (B,). A pure function: the same draw, the same token.

    temperature divides the logits: below 1 the likely gets likelier; 0 takes the best.
    top_k       only the k best may be chosen [1]: exactly k, also among equals. 0: all.
    top_p       only the fewest best whose probabilities reach p [2]: the one that crosses p is in. 1: all, 0: the best.
    """
    if temperature == 0 or top_k == 1 or top_p == 0:
        return logits.argmax(dim=-1)
    logits = logits.double()
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature          # no overflow, however cold
    order = None
    if top_k:
        logits, order = logits.topk(min(top_k, logits.size(-1)))
    elif top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
    p = logits.softmax(dim=-1)
    if top_p < 1:
        before = p.cumsum(dim=-1) - p  # what the better ones have together: nothing before the best
        p = p * (before < top_p)
    reached = p.cumsum(dim=-1)
    at = (reached > uniform[:, None].to(p) * reached[:, -1:]).int().argmax(dim=-1)     # the first that passes the draw
    return at if order is None else order.gather(1, at[:, None])[:, 0]


@torch.inference_mode()
def generate(model, ids, max_new_tokens, temperature=0.8, top_k=0, top_p=1.0, seed=0, first_row=0, forbidden=None,
             end_id=None, keep=None, cache=None):
    """
    Continue ids (B, T): yields the next tokens (B,), at most max_new_tokens times. Row i draws from a generator of its
    own, (seed, first_row + i), so a sample does not depend on its neighbours; first_row may list the numbers of all.
    forbidden (V,) marks tokens never chosen. A row that has chosen end_id stays at it; when all have, it is over.

    The cache lets a step feed only the newest token. When the window is full, the newer half is read again from its
    first position, and the older half is forgotten. keep (B, T) is False at padding, on the left; cache: that of a source
    that an encoder has read. With either, prompt and new tokens must fit into block_size.
    """
    rows = range(first_row, first_row + len(ids)) if isinstance(first_row, int) else first_row
    draws = [np.random.default_rng((seed, row)) for row in rows]
    block_size, active = model.config.block_size, torch.arange(len(ids), device=ids.device)  # rows that are still written
    window = new = ids[:, -block_size:]
    cache = {} if cache is None else cache
    for _ in range(max_new_tokens):
        if window.size(1) > block_size:
            window = new = window[:, -max(1, block_size // 2):]
            cache = {}
        logits, keep = model.decode(new, keep, cache), None                            # (B, V)
        if forbidden is not None:
            logits = logits.masked_fill(forbidden, -math.inf)
        if ids.device.type == 'mps':  # it has no float64
            logits = logits.cpu()
        uniform = torch.tensor([draw.random() for draw in draws], dtype=torch.float64, device=logits.device)
        token = choose(logits, uniform, temperature, top_k, top_p).to(ids.device)      # (B,)
        yield token if len(active) == len(ids) else torch.full_like(ids[:, 0], end_id).index_put((active,), token)
        if end_id is not None:
            going = (token != end_id).nonzero()[:, 0]
            if not len(going):
                return
            if len(going) < len(active):
                active, token, window = active[going], token[going], window[going]
                cache, draws = pick_rows(cache, going, going), [draws[i] for i in going.tolist()]
        new = token[:, None]                                                           # (B, 1)
        window = torch.cat([window, new], dim=1)


def pick_rows(cache, rows, sources=None):
    """
    The cache of other rows: row i of the new one is rows[i] of the old one. Goes through dicts within. What it holds of an
    encoder's source stays, since beams share it, unless other `sources` are picked.
    """
    def pick(key, value):
        picked = sources if key in ('memory', 'memory_keep', 'cross') else rows
        if picked is None or value is None or isinstance(value, int):
            return value
        if isinstance(value, dict):
            return pick_rows(value, picked, picked if key == 'cross' else sources)
        return tuple(t[:, picked] for t in value) if isinstance(value, tuple) else value[picked]

    return {key: pick(key, value) for key, value in cache.items()}


@torch.inference_mode()
def beam_search(model, ids, beams, max_new_tokens, length_penalty=1.0, forbidden=None, end_id=None, keep=None, cache=None):
    """
    The likeliest continuations of ids (B, T), ended by end_id: for each row the best `beams` as [(score, tokens), ...], best
    first. The score is log P(tokens) / length^length_penalty, where the length counts the new tokens and their end: a larger
    penalty favours longer texts, 0 takes the probability as it is: section 7 of [6]. A row is done when `beams` texts have
    ended, each better than the best that still grows would be if it ended now; with one beam, at the first end. What has not
    ended after max_new_tokens counts as it is.
    """
    B, device = len(ids), ids.device
    cache = {} if cache is None else cache
    new, scores = ids, torch.zeros(B, 1, device=device)                                # one beam at first, (B, K)
    tokens, best, going = [[[]] for _ in range(B)], [[] for _ in range(B)], list(range(B))
    for length in range(1, max_new_tokens + 1):
        logits, keep = model.decode(new, keep, cache).float(), None                    # (B K, V)
        if forbidden is not None:
            logits = logits.masked_fill(forbidden, -math.inf)
        total = scores[..., None] + logits.log_softmax(dim=-1).unflatten(0, (len(going), -1))  # (B, K, V)
        V = total.size(-1)
        top, at = total.flatten(1).topk(min(2 * beams, total[0].numel()))              # at most `beams` of them end
        rows, chosen, kept, on = [], [], [], []                                        # on: which rows go on
        for i, (b, top_b, at_b) in enumerate(zip(going, top.tolist(), at.tolist())):
            grown, done = [], False
            for rank, (score, where) in enumerate(zip(top_b, at_b)):
                k, token = divmod(where, V)
                if score == -math.inf:
                    continue
                if token == end_id and rank < beams:
                    best[b].append((score / length ** length_penalty, tokens[b][k]))
                elif token != end_id and len(grown) < beams:
                    grown.append((score, k, token))
            best[b] = sorted(best[b], key=lambda hypothesis: -hypothesis[0])[:beams]
            if grown:  # what ends now would score at most this
                bound = grown[0][0] / length ** length_penalty
                done = len(best[b]) == beams and (beams == 1 or bound <= best[b][-1][0])
            if done or not grown:
                continue
            grown += [(-math.inf, *grown[0][1:])] * (beams - len(grown))               # every row has as many beams
            rows += [i * len(tokens[b]) + k for _, k, _ in grown]
            tokens[b] = [tokens[b][k] + [token] for _, k, token in grown]
            chosen += [token for _, _, token in grown]
            kept.append([score for score, _, _ in grown])
            on.append(i)
        sources = torch.tensor(on, device=device) if len(on) < len(going) else None
        going = [going[i] for i in on]
        if not going:
            break
        if rows != list(range(len(total) * total.size(1))):
            cache = pick_rows(cache, torch.tensor(rows, device=device), sources)
        scores = torch.tensor(kept, device=device)                                     # (B, K)
        new = torch.tensor(chosen, device=device)[:, None]                             # (B K, 1)
    for b, unfinished in zip(going, kept):
        best[b] += [(s / max_new_tokens ** length_penalty, t) for s, t in zip(unfinished, tokens[b]) if s > -math.inf]
        best[b] = sorted(best[b], key=lambda hypothesis: -hypothesis[0])[:beams]
    return best

# -----------------------------------------------------------------------------
# From ids to text


class TextStream:
    """
    Token by token to text. A character may be several tokens, so bytes wait here until it is whole; and text that could
    be the beginning of a stop text waits until it is clear whether it is one.
    """

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.waiting, self.stopped = '', False

    def add(self, token):
        """The text that is certain now. After a stop text has come, `stopped` is True and nothing follows."""
        return self.release(self.decoder.decode(self.tokenizer.decode_single_token_bytes(token)))

    def end(self):
        """What still waited."""
        return self.release(self.decoder.decode(b'', final=True), last=True)

    def release(self, text, last=False):
        if self.stopped:
            return ''
        text = self.waiting + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text]
        if found:  # the one that is complete first, whatever the pieces in which the text came
            self.stopped, self.waiting = True, ''
            return text[:min(found)[1]]
        held = 0 if last else max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
                                  default=0)
        self.waiting = text[len(text) - held:]
        return text[:len(text) - held]


def forbidden_tokens(tokenizer, vocab_size):
    """(vocab_size,) bool: special tokens, and rows that no token has. They are never text; <|endoftext|> may be chosen."""
    forbidden = torch.zeros(vocab_size, dtype=torch.bool)
    end_id = tokenizer._special_tokens['<|endoftext|>']
    forbidden[[i for i in tokenizer._special_tokens.values() if i != end_id and i < vocab_size]] = True
    forbidden[tokenizer.n_vocab:] = True
    return forbidden


def prompt_ids(tokenizer, prompt):
    """What a GPT is to continue. Some want a token before every text; without text, all need one."""
    special = tokenizer._special_tokens
    begin = [special['<|start|>']] if '<|start|>' in special else [] if prompt else [special['<|endoftext|>']]
    return [*begin, *encode(tokenizer, prompt).tolist()]


def write(model, tokenizer, prompt, settings, first_row=0, rows=1):
    """
    Continue the text `prompt` in `rows` samples: yields (row, text) as text becomes certain. An empty prompt
    starts a new document. Raises ValueError where the tokenizer cannot encode the prompt.
    """
    end_id, device = tokenizer._special_tokens['<|endoftext|>'], next(model.parameters()).device
    ids = torch.tensor(prompt_ids(tokenizer, prompt), device=device).expand(rows, -1)  # (rows, T)
    streams = [TextStream(tokenizer, settings.stop) for _ in range(rows)]
    ended = [False] * rows
    for tokens in generate(model, ids, settings.max_new_tokens,
                           0.8 if settings.temperature is None else settings.temperature, settings.top_k, settings.top_p,
                           settings.seed, first_row, forbidden_tokens(tokenizer, model.config.vocab_size).to(device),
                           end_id):
        for row, token in enumerate(tokens.tolist()):
            ended[row] = ended[row] or token == end_id
            if not ended[row]:
                yield row, streams[row].add(token)
                ended[row] = streams[row].stopped
        if all(ended):
            break
    for row, stream in enumerate(streams):
        yield row, stream.end()


def write_beams(model, tokenizer, prompt, settings):
    """
    The likeliest ways to go on, best first: [(score, text)], settings.num_samples of them. A search has one window: of a
    long prompt it sees the newest half, and a text ends where the window is full.
    """
    end_id, block_size = tokenizer._special_tokens['<|endoftext|>'], model.config.block_size
    device = next(model.parameters()).device
    longest = max(1, block_size // 2, block_size - settings.max_new_tokens)
    ids = torch.tensor([prompt_ids(tokenizer, prompt)[-longest:]], device=device)      # (1, T)
    room = max(1, min(settings.max_new_tokens, block_size - ids.size(1)))
    found = []
    for score, tokens in beam_search(model, ids, settings.num_beams, room, settings.length_penalty,
                                     forbidden_tokens(tokenizer, model.config.vocab_size).to(device), end_id)[0]:
        stream = TextStream(tokenizer, settings.stop)
        found.append((score, ''.join(map(stream.add, tokens)) + stream.end()))
    return found[:settings.num_samples]

# -----------------------------------------------------------------------------
# Answers of the models that do not write


def collate(examples, pad_id):
    """
    A list of examples -> a batch: a dict of tensors. Rows of unequal length are padded on the right, and
    `keep` says what is real. The key `about` is for scoring only and stays behind.
    """
    fill = {'ids': pad_id, 'decoder_ids': pad_id, 'targets': IGNORE}
    batch = {}
    for key in examples[0]:
        if key == 'about':
            continue
        rows = [np.asarray(example[key], np.int64) for example in examples]
        shape = np.max([row.shape for row in rows], axis=0)
        if any(row.shape != tuple(shape) for row in rows):
            padded = np.full((len(rows), *shape), fill.get(key, 0))
            for i, row in enumerate(rows):
                padded[i, :len(row)] = row
            rows = padded
            if key == 'ids':
                batch['keep'] = torch.from_numpy(np.arange(shape[0]) < [[len(e['ids'])] for e in examples])  # (B, T)
        batch[key] = torch.from_numpy(np.stack(rows))
    return batch


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


def ask(model, examples, pad_id, take=lambda example, logits: logits, rows=64):
    """
    Examples -> (what `take` wants of the logits of each, given as float32 numpy; the sum of their losses, in nats; the
    number of targets asked). Batches hold examples of about one length, and the answers have the order of the examples.
    """
    device, taken, nats, asked = next(model.parameters()).device, [None] * len(examples), 0.0, 0
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]['ids']))
    for at in range(0, len(order), rows):
        progress(f"{at:,} of {len(order):,}")
        chosen = order[at:at + rows]
        batch = {key: t.to(device) for key, t in collate([examples[i] for i in chosen], pad_id).items()}
        with evaluating(model):
            out, loss = model(**batch, counts={'targets': 1})
        if loss is not None:
            nats, asked = nats + loss.item(), asked + int((batch['targets'] != IGNORE).sum())
        for i, row in zip(chosen, out.float().cpu().numpy()):
            taken[i] = take(examples[i], row)
    progress('')
    return taken, nats, asked


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def read_label(examples, logits, labels):
    """(L,) -> the likeliest label."""
    p = softmax(logits[0])
    return {'label': labels[p.argmax()], 'probability': float(p.max()),
            'probabilities': {label: float(x) for label, x in zip(labels, p)}}


def entities(tags):
    """
    Tags -> [(kind, first, behind the last)]: as seqeval and CoNLL's own script [4] read them, an I-kind that follows no
    entity of its kind begins one.

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


def read_tags(examples, logits, labels):
    """(T, L) of each part of a text -> a tag for every token, that of its first piece, and the entities they make."""
    tokens = [token for example in examples for token in example['about']['tokens']]
    tags = [labels[row[t].argmax()] for example, row in zip(examples, logits) for t in example['about']['where']]
    return {'tokens': tokens, 'tags': tags, 'entities': [
        {'kind': kind, 'text': ' '.join(tokens[i:j]), 'first': i, 'last': j - 1} for kind, i, j in entities(tags)]}


def read_span(examples, logits, labels):
    """
    (2, T) of each window -> the span whose first and last token are the likeliest together, at most 30 tokens of one window
    [3]. A window that does not hold the answer says so by pointing at [CLS]. Where the training data had questions without
    an answer, '' is one: when [CLS] is likelier in every window.
    """
    best, nothing = (-1.0, 0, 0, 0), 1.0
    for n, (example, row) in enumerate(zip(examples, logits)):
        p, about = softmax(row), example['about']
        first, size = about['first'], len(about['offsets'])
        both = np.triu(p[0, first:first + size, None] * p[1, None, first:first + size])   # ends not before it begins
        both = np.tril(both, 29)
        solid = np.array([not about['context'][a:b].isspace() for a, b in about['offsets']], int).cumsum()
        both *= solid[None, :] > np.append(0, solid)[:size, None]                         # white space is no answer
        if size:
            begin, end = np.unravel_index(both.argmax(), both.shape)
            best = max(best, (float(both[begin, end]), n, begin, end))
        nothing = min(nothing, float(p[0, 0] * p[1, 0]))
    p, n, begin, end = best
    about = examples[n]['about']
    if p < 0 or (labels and nothing > p):
        return {'answer': '', 'probability': nothing}
    low, high = about['offsets'][begin][0], about['offsets'][end][1]
    text = about['context'][low:high]
    low += len(text) - len(text.lstrip())
    return {'answer': text.strip(), 'probability': p, 'start': about['start'] + low}


ANSWERS = {'classify': read_label, 'tag': read_tags, 'qa': read_span}


def write_targets(model, tokenizer, examples, settings):
    """
    A text for each source: {'target': the best, 'n_best': [{'text', 'score'}, ...] where beams were asked for}. Sources of
    about one length are decoded together. A GPT reads the source as a prompt that ends in [SEP].
    """
    special, device = tokenizer._special_tokens, next(model.parameters()).device
    end_id, pad_id, block_size = special['<|endoftext|>'], special['[PAD]'], model.config.block_size
    forbidden = forbidden_tokens(tokenizer, model.config.vocab_size).to(device)
    answers, order = [None] * len(examples), sorted(range(len(examples)), key=lambda i: len(examples[i]['ids']))
    size, encoder = max(1, 1024 // settings.num_beams), hasattr(model, 'read')
    groups = [order]  # a padded prompt would have less room for its answer, so those of a GPT are of one length
    if not encoder:
        groups = [list(group) for _, group in itertools.groupby(order, key=lambda i: len(examples[i]['ids']))]
    for chosen in (group[at:at + size] for group in groups for at in range(0, len(group), size)):
        progress(f"{sum(a is not None for a in answers):,} of {len(order):,} texts")
        sources = [examples[i]['ids'] for i in chosen]
        if encoder:
            batch = {key: t.to(device) for key, t in collate([{'ids': ids} for ids in sources], pad_id).items()}
            with torch.inference_mode():
                cache = model.read(**batch)
            prompt, room = torch.full((len(sources), 1), special.get('<|start|>', end_id), device=device), block_size
        else:
            cache, prompt = None, torch.tensor([[*ids[:-1], special['[SEP]']] for ids in sources], device=device)
            room = block_size - prompt.size(1)
        room = max(1, min(settings.max_new_tokens, room))
        if settings.num_beams > 1:
            n_best = beam_search(model, prompt, settings.num_beams, room, settings.length_penalty, forbidden, end_id,
                                 cache=cache)
            for i, found in zip(chosen, n_best):
                texts = [{'text': tokenizer.decode(tokens), 'score': score} for score, tokens in found]
                answers[i] = {'target': texts[0]['text'], 'n_best': texts}
            continue
        steps = list(generate(model, prompt, room, settings.temperature or 0.0, settings.top_k, settings.top_p,
                              max(0, settings.seed), chosen, forbidden, end_id, cache=cache))
        for i, tokens in zip(chosen, torch.stack(steps, dim=1).tolist()):
            answers[i] = {'target': tokenizer.decode(tokens[:tokens.index(end_id)] if end_id in tokens else tokens)}
    progress('')
    return answers


def answer(model, examples, task, labels, pad_id):
    """
    Examples of many rows -> (the answers, one a row; the examples of each row; the mean loss of a target, in nats, or None
    where no targets are given).
    """
    logits, nats, asked = ask(model, examples, pad_id)
    rows = {}
    for i, example in enumerate(examples):
        rows.setdefault(example['about']['row'], []).append(i)
    rows = list(rows.values())
    answers = [ANSWERS[task]([examples[i] for i in row], [logits[i] for i in row], labels) for row in rows]
    return answers, [[examples[i] for i in row] for row in rows], nats / asked if asked else None

# -----------------------------------------------------------------------------
# Scores


def ratio(a, b):
    return a / b if b else 0.0


def f1(precision, recall):
    """The harmonic mean: near the worse of the two."""
    return ratio(2 * precision * recall, precision + recall)


def label_scores(answers, golds):
    """Accuracy, and the mean over labels of the F1 of finding that label."""
    guesses, right = [a['label'] for a in answers], [g[0]['about']['label'] for g in golds]
    hits = collections.Counter(g for g, r in zip(guesses, right) if g == r)
    guessed, there = collections.Counter(guesses), collections.Counter(right)
    return {'accuracy': ratio(sum(hits.values()), len(right)), 'macro_f1': float(np.mean([
        f1(ratio(hits[label], guessed[label]), ratio(hits[label], there[label])) for label in guessed | there]))}


def entity_scores(answers, golds):
    """Precision, recall and F1 of whole entities [4]: both ends and the kind must be right."""
    found = {(i, *e) for i, a in enumerate(answers) for e in entities(a['tags'])}
    there = {(i, *e) for i, g in enumerate(golds) for e in entities([t for part in g for t in part['about']['tags']])}
    precision, recall = ratio(len(found & there), len(found)), ratio(len(found & there), len(there))
    return {'precision': precision, 'recall': recall, 'f1': f1(precision, recall)}


def answer_words(text):
    """As SQuAD's script compares answers [3]: no case, punctuation, articles. Each CJK character is a word."""
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return CJK.sub(r' \g<0> ', re.sub(r'\b(a|an|the)\b', ' ', text)).split()


def answer_scores(answers, golds):
    """Exact match, and F1 of the words in common, each against the best of the right answers."""
    exact, overlap = 0.0, 0.0
    for a, g in zip(answers, golds):
        words, rights = answer_words(a['answer']), [answer_words(t) for t in g[0]['about']['answers']]
        rights = list(filter(None, rights)) or [[]]    # no answer, or one of which nothing is left
        common = [sum((collections.Counter(words) & collections.Counter(right)).values()) for right in rights]
        exact += any(words == right for right in rights)
        overlap += max(f1(ratio(n, len(words)), ratio(n, len(right))) if words and right else float(words == right)
                       for n, right in zip(common, rights))
    return {'exact_match': ratio(exact, len(answers)), 'f1': ratio(overlap, len(answers))}


def grams(words, n):
    return collections.Counter(zip(*(words[i:] for i in range(n))))


SPLIT_OFF = [(re.compile(pattern), apart) for pattern, apart in (
    (r'([!-&(-+:-@/\[-`{-~ ])', r' \1 '),              # most signs
    (r'([^0-9])([.,])', r'\1 \2 '), (r'([.,])([^0-9])', r' \1 \2'), (r'([0-9])(-)', r'\1 \2 '))]
WIDE = regex.compile('[' + '\u3400-\u4db5 \u4e00-\u9fbb \uf900-\ufa2d \ufa30-\ufa6a \ufa70-\ufad9 \uff00-\uffef '
                     '\u2001-\u2a6d \u2e80-\u2eff \u3000-\u303f \u31c0-\u31ef \u2f00-\u2fdf \u2ff0-\u2fff \u3100-\u312f '
                     '\u31a0-\u31bf \ufe10-\ufe1f \ufe30-\ufe4f \u3200-\u33ff'.replace(' ', '') + ']')


def bleu_words(text, wide):
    """
    The tokens that BLEU compares, as sacrebleu's 13a rule makes them: punctuation stands alone, but not . and , within a
    number. wide: its zh rule, by which each CJK character does too.
    """
    if wide:
        text = WIDE.sub(r' \g<0> ', text.strip())
    else:
        text = text.replace('<skipped>', '').replace('-\n', '').replace('\n', ' ')
        for code, sign in (('&quot;', '"'), ('&amp;', '&'), ('&lt;', '<'), ('&gt;', '>')):
            text = text.replace(code, sign)
        text = f' {text} '
    for pattern, apart in SPLIT_OFF:
        text = pattern.sub(apart, text)
    return text.split()


def bleu(guesses, rights):
    """
    BLEU [7] of a whole corpus, 0 to 100: the geometric mean of the shares of its 1- to 4-grams that stand in the reference
    too, times a penalty where it is shorter. An order without a match counts as half of what the one before would (Chen and
    Cherry 2014, method 3).
    """
    wide = any(CJK.search(right) for right in rights)
    hits, total, guessed, right_length = [0] * 4, [0] * 4, 0, 0
    for guess, right in zip(guesses, rights):
        guess, right = bleu_words(guess, wide), bleu_words(right, wide)
        guessed, right_length = guessed + len(guess), right_length + len(right)
        for n in range(4):
            found = grams(guess, n + 1)
            hits[n] += sum((found & grams(right, n + 1)).values())
            total[n] += sum(found.values())
    if not hits[0]:
        return 0.0
    smooth, logs = 1.0, []
    for hit, n in zip(hits, total):
        if n:
            smooth *= 1 if hit else 2
            logs.append(math.log(hit / n if hit else 1 / (smooth * n)))
    if len(logs) < 4:
        return 0.0
    return 100 * math.exp(sum(logs) / 4) * min(1.0, math.exp(1 - right_length / guessed))


def rouge_words(text):
    """Letters and digits, in small letters; each CJK character is a word."""
    return regex.findall('[a-z0-9]+|' + CJK.pattern, text.lower())


def rouge(guess, right):
    """ROUGE-1, -2, -L [8]: F1 of the words, of the pairs of words, of the longest common subsequence."""
    guess, right, found = rouge_words(guess), rouge_words(right), []
    for n in (1, 2):
        a, b = grams(guess, n), grams(right, n)
        hit = sum((a & b).values())
        found.append(f1(ratio(hit, sum(a.values())), ratio(hit, sum(b.values()))))
    row = [0] * (len(right) + 1)
    for word in guess:
        before = 0
        for i, other in enumerate(right, 1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return [*found, f1(ratio(row[-1], len(guess)), ratio(row[-1], len(right)))]


def text_to_text_scores(answers, golds):
    """BLEU of the corpus; ROUGE and exact match, the means over the texts."""
    guesses, rights = [a['target'] for a in answers], [g[0]['about']['target'] for g in golds]
    names = ('rouge1', 'rouge2', 'rougeL')
    return {'bleu': bleu(guesses, rights),
            **dict(zip(names, np.mean([rouge(a, b) for a, b in zip(guesses, rights)], axis=0).tolist())),
            'exact_match': ratio(sum(a.strip() == b.strip() for a, b in zip(guesses, rights)), len(rights))}


SCORES = {'classify': label_scores, 'tag': entity_scores, 'qa': answer_scores, 'seq2seq': text_to_text_scores}


def task_scores(model, examples, task, labels, tokenizer, settings=None):
    """Loss and scores of labelled examples, all of them; of text to text, those of greedy decoding."""
    if task == 'seq2seq':
        examples = list(examples)
        answers = write_targets(model, tokenizer, examples, settings or Settings(temperature=0.0))
        return SCORES[task](answers, [[example] for example in examples])
    answers, golds, loss = answer(model, list(examples), task, labels, tokenizer._special_tokens['[PAD]'])
    return {'loss': loss, **SCORES[task](answers, golds)}


def masked_text(tokenizer, text, block_size):
    """
    `The [MASK] statement` -> an example whose [MASK] tokens are to be guessed; `a ||| b` for two texts. Where tokens carry
    the space before a word, the one before [MASK] belongs to what is hidden. Raises ValueError where there is no [MASK].
    """
    if '[MASK]' not in text:
        raise ValueError(f"{text[:60]!r} has no [MASK]: write one where a word is to be guessed")
    spaced = any(len(token) > 1 and token.startswith(b' ') for token in tokenizer._mergeable_ranks)
    parts = []
    if text.count('|||') > 1:
        raise ValueError(f"{text[:60]!r}: write one text, or two as a ||| b")
    for part in text.split('|||'):
        ids = []
        for i, piece in enumerate(part.strip().split('[MASK]')):
            last = i == part.count('[MASK]')
            ids += encode(tokenizer, piece.removesuffix(' ') if spaced and not last else piece).tolist()
            ids += [] if last else [tokenizer._special_tokens['[MASK]']]
        parts.append(ids)
    ids, segments = frame(tokenizer, *parts)
    if len(ids) > block_size:
        raise ValueError(f"{text[:60]!r} has {len(ids)} tokens, more than block_size={block_size}: shorten it")
    return {'ids': ids, 'segments': segments, 'about': {'text': text}}


def read_masks(tokenizer, example, logits, k):
    """(T, V) -> for each [MASK] its k best guesses: [(text, probability)]."""
    mask, hidden = tokenizer._special_tokens['[MASK]'], forbidden_tokens(tokenizer, logits.shape[-1]).numpy()
    hidden[tokenizer._special_tokens['<|endoftext|>']] = True
    guesses = []
    for row in logits[np.flatnonzero(np.array(example['ids']) == mask)]:
        p = softmax(np.where(hidden, -np.inf, row))
        guesses.append([(tokenizer.decode([i]).strip() or tokenizer.decode([i]), float(p[i]))
                        for i in (-p).argsort()[:k] if not hidden[i]])
    return guesses


def hidden_scores(model, tokenizer, ids, positions=4096):
    """
    How well BERT knows a text, ids (n,): hide one token at a time, see all others of its window, and guess. Returns the
    share that is right, and the pseudo-perplexity [5], exp of the mean -log P(token | the others). In long texts `positions`
    tokens, evenly spread, are asked for.
    """
    room, special = model.config.block_size - 2, tokenizer._special_tokens
    asked = np.unique(np.linspace(0, len(ids) - 1, min(positions, len(ids))).astype(int))
    examples = []
    for i in asked.tolist():
        window = ids[i // room * room:][:room].tolist()
        framed, segments = frame(tokenizer, window)
        targets = [IGNORE] * len(framed)
        at = i % room + 1
        targets[at], framed[at] = framed[at], special['[MASK]']
        examples.append({'ids': framed, 'segments': segments, 'targets': targets})
    right, nats, n = ask(model, examples, special['[PAD]'], lambda e, logits: logits.argmax() == max(e['targets']))  # (V,)
    return {'masked_accuracy': float(np.mean(right)), 'pseudo_perplexity': math.exp(min(nats / n, 700))}


def text_loss(model, tokens, block_size=0, rank=0, world=1, context=contextlib.nullcontext):
    """
    How well a model predicts a row of ids (n,), in windows of block_size that do not overlap: (nats, predictions). Every
    token but the first is predicted once; the loss is nats / predictions. With several ranks, each takes its share of
    the windows, and the sums are the caller's to add.
    """
    T = block_size or model.config.block_size
    rows = max(1, min(64, 2 ** 25 // (T * model.config.vocab_size)))  # what the logits of a batch may take in memory
    device, nats, predictions = next(model.parameters()).device, 0.0, 0
    starts = list(range(0, len(tokens) - 1, T))
    whole = [s for s in starts if s + T < len(tokens)]
    batches = [whole[i:i + rows] for i in range(0, len(whole), rows)] + [[s] for s in starts[len(whole):]]
    for batch in batches[rank::world]:
        window = np.stack([tokens[s:s + T + 1].astype(np.int64) for s in batch])       # (rows, T + 1)
        window = torch.from_numpy(window).to(device)
        with evaluating(model), context():
            _, loss = model(window[:, :-1], targets=window[:, 1:], counts={'targets': 1})
        nats, predictions = nats + loss.item(), predictions + window[:, 1:].numel()
    return nats, predictions


def shot_scores(model, tokens, end_id, shown=(0, 1, 2, 4, 8, 16, 29), context=contextlib.nullcontext):
    """
    Of documents of `recall`: how often the digit behind a letter is foretold, after how many pairs. The model has been told
    nothing of them before: it has to look them up. Raises ValueError where a character is not a token.
    """
    length = 2 * SHOTS + 2                             # letters and digits, a line break, <|endoftext|>
    if len(tokens) % length or (tokens[length - 1::length] != end_id).any():
        raise ValueError("recall asks what a character tells of the next: prepare it with --tokenizer char")
    ids = np.roll(tokens.reshape(-1, length), 1, axis=1)[:, :2 * SHOTS + 1]            # <|endoftext|> k 7 a 2 k 7 ...
    ids = torch.from_numpy(ids.astype(np.int64)).to(next(model.parameters()).device)
    with evaluating(model), context():
        guesses = torch.cat([model(rows[:, :-1])[0][:, 1::2].argmax(dim=-1) for rows in ids.split(256)])
    right = (guesses == ids[:, 2::2]).float().mean(dim=0).tolist()                     # (SHOTS,)
    return {f'after_{n}': right[n] for n in shown}


def text_scores(nats, predictions, text_bytes):
    """Loss in nats a token, perplexity = exp(loss), and bits per byte, which compares across tokenizers."""
    loss = nats / predictions
    return {'loss': loss, 'perplexity': math.exp(min(loss, 700)), 'bits_per_byte': nats / math.log(2) / max(1, text_bytes)}


def format_scores(scores):
    """loss 1.8980, perplexity 6.67, bits per byte 2.738"""
    digits = {'perplexity': 2, 'pseudo_perplexity': 2, 'bits_per_byte': 3, 'bleu': 2}
    return ', '.join(f"{name.replace('_', ' ')} {value:.{digits.get(name, 4)}f}" for name, value in scores.items())


def read_text(tokenizer, path):
    """A text file as prepare_data.py reads it: (ids, documents ending in <|endoftext|>; its size in bytes)."""
    ids, size, end_id = [], 0, tokenizer._special_tokens['<|endoftext|>']
    open_document = False
    for file in find_files([path]):
        for text, last in read_documents(file):
            ids.append(encode(tokenizer, text))
            size += len(text.encode())
            open_document = open_document or bool(text)
            if last and open_document:
                ids.append(np.array([end_id]))
                open_document = False
    ids = np.concatenate(ids) if ids else np.zeros(0)
    if len(ids) < 2:
        raise ValueError(f"--score {path}: no text in it")
    return ids, size


def score_file(model, tokenizer, path, task='', labels=(), settings=None):
    """Score a file in the format that prepare_data.py reads for what the model was trained for. Raises ValueError."""
    if not task:
        ids, size = read_text(tokenizer, path)
        if hasattr(model, 'decode'):
            return text_scores(*text_loss(model, ids), size)
        return hidden_scores(model, tokenizer, ids[ids != tokenizer._special_tokens['<|endoftext|>']])
    rows = [row for file in find_files([path]) for row in TASKS[task].read(file)]
    if not rows:
        raise ValueError(f"--score {path}: no rows in it")
    check_labels(task, rows, labels)
    asked = [{key: row[key] for key in row if key != 'answers'} for row in rows]  # or tokens would be cut where answers end
    examples = encode_rows(tokenizer, task, asked, labels, model.config.block_size)
    for example in examples if task == 'qa' else []:
        example['about']['answers'] = [text for _, text in rows[example['about']['row']]['answers']]
    scores = task_scores(model, examples, task, labels, tokenizer, settings)
    return {name: scores[name] for name in scores if name != 'loss'}

# -----------------------------------------------------------------------------
# Attention to look at


def attention_maps(model, batch):
    """
    A batch -> who looks at whom: {'encoder' | 'decoder' | 'cross': (layers, B, H, T, S)}, float32 numpy. Raises ValueError
    where the model has no attention.
    """
    layers, seen = [], {}
    for path, layer in model.named_modules():
        if isinstance(layer, Attention):
            name = 'cross' if path.endswith('cross') else 'encoder' if 'encoder.' in path else 'decoder'
            layers.append(layer)
            layer.seen = []
            seen.setdefault(name, []).append(layer.seen)
    if not layers:
        raise ValueError("this model has no attention to look at: an LSTM knows of its past what its state holds")
    try:
        with evaluating(model):
            model(**batch)
    finally:
        for layer in layers:
            layer.seen = None
    return {name: torch.stack([weights for [weights] in calls]).float().cpu().numpy() for name, calls in seen.items()}


def to_look_at(model, tokenizer, prompt, task, labels, max_new_tokens):
    """
    A prompt -> the example that a model reads of it, and what it leaves out, in words. An encoder-decoder reads, behind its
    start, what it writes greedily; all others read the prompt alone.
    """
    special, block_size, device = tokenizer._special_tokens, model.config.block_size, next(model.parameters()).device
    text = prompt.strip()
    if not text:
        raise ValueError("--start is empty: give a text, FILE:path, or - for standard input")
    if not task and hasattr(model, 'decode'):
        ids = prompt_ids(tokenizer, prompt)
        return {'ids': ids[-block_size:]}, f", the newest of {len(ids):,}" * (len(ids) > block_size)
    if len(lines := text.split('\n')) > 1:
        raise ValueError(f"--attention shows one line, and --start has {len(lines)}: leave the others out")
    if task or '[MASK]' not in text:
        kind = task or 'classify'  # whatever it was trained for, a BERT reads one text or two
        example, *more = encode_rows(tokenizer, kind, [read_line(kind, text)], labels, block_size)
    else:
        example, more = masked_text(tokenizer, text, block_size), []
    if hasattr(model, 'read'):
        end_id, forbidden = special['<|endoftext|>'], forbidden_tokens(tokenizer, model.config.vocab_size).to(device)
        start_id = special.get('<|start|>', end_id)
        with torch.inference_mode():
            cache = model.read(torch.tensor([example['ids']], device=device))
        written = [token.item() for token in generate(
            model, torch.tensor([[start_id]], device=device), min(max_new_tokens, block_size), temperature=0,
            forbidden=forbidden, end_id=end_id, cache=cache)]
        example['decoder_ids'] = [start_id, *written[:-1]]  # nothing looks from the last
    elif task == 'seq2seq':
        example['ids'][-1] = special['[SEP]']  # as in write_targets
    return example, f", the first of {1 + len(more)} parts" * bool(more)


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Attention</title>
<style>
:root { color-scheme: light dark; --ink: #1a1d24; --paper: #fcfcfa; --soft: #626978; --edge: #d5d8df; --accent: #2563d6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9eaef; --paper: #14161b; --soft: #9aa1b1; --edge: #363b47; --accent: #6ea3ff }
}
body { margin: 0 auto; max-width: 84rem; padding: 1rem; font: 1rem/1.4 system-ui, sans-serif; color: var(--ink);
       background: var(--paper) }
h1 { font-size: 1.35rem; margin: 0 } h2 { font-size: .9rem; font-weight: normal; color: var(--soft); margin: .3rem 0 }
p { margin: .3rem 0 1rem; color: var(--soft); max-width: 46rem }
form { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem }
select { font: inherit; padding: .25rem .4rem }
output { display: block; position: sticky; top: 0; z-index: 1; padding: .5rem 0; min-height: 2.8em; overflow-wrap: anywhere;
         background: var(--paper) }
main { display: grid; gap: 1.5rem; align-items: start }
@media (min-width: 60rem) {
  main { grid-template-columns: minmax(0, 3fr) minmax(0, 2fr) }
  #map { position: sticky; top: 4.5rem }
}
#lines { position: relative }
canvas { color: var(--accent) }
#curves { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none }
.tokens { display: flex; flex-wrap: wrap; gap: 2px }
#rows { margin-bottom: 5rem }
button { font: inherit; min-width: 2.2rem; max-width: 100%; padding: .1rem .2rem; overflow-wrap: anywhere; cursor: pointer;
         color: inherit; border: 1px solid var(--edge); border-radius: 4px;
         background: color-mix(in srgb, var(--accent) calc(var(--weight, 0) * 55%), transparent) }
button:focus-visible { outline: 2px solid var(--ink); outline-offset: 1px }
button::after { content: attr(data-number); display: block; height: 1.2em; font-size: .68rem; line-height: 1.2 }
button.shown { border-color: var(--accent); box-shadow: 0 0 0 2px var(--accent) }
#map { display: grid; grid-template-columns: auto minmax(0, 1fr); font-size: .7rem; line-height: 1 }
#map.bare > :not(canvas) { display: none } #map.bare { grid-template-columns: minmax(0, 1fr) }
#left, #above { display: grid; grid-auto-rows: minmax(0, 1fr) }
#above { grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr) }
#map span { margin: auto 0 auto auto; padding: 0 .4em; max-width: 7em; max-height: 7em; overflow: hidden; white-space: pre }
#above span { writing-mode: vertical-rl; margin: auto auto 0; padding: .4em 0 }
#heat { width: 100%; image-rendering: pixelated; outline: 1px solid var(--edge) }
</style>
<h1>Who looks at whom</h1>
<p>Point at a token, tap it, or go to it with the Tab key: its lines stand out, and its row of the map. A click or the Enter
key keeps it, and lets it go again. The weights of a token that looks add up to 1; the stronger a colour, the larger the
weight.</p>
<form>
  <span><label for="kind">Attention</label> <select id="kind"></select></span>
  <span><label for="layer">Layer</label> <select id="layer"></select></span>
  <span><label for="head">Head</label> <select id="head"></select></span>
</form>
<output id="said" for="kind layer head" aria-live="polite"></output>
<main>
  <section id="lines" aria-label="Tokens">
    <canvas id="curves" aria-hidden="true"></canvas>
    <h2>who looks</h2><div id="rows" class="tokens"></div>
    <h2>at whom</h2><div id="cols" class="tokens"></div>
  </section>
  <section id="map" aria-label="Map">
    <i></i><div id="above" aria-hidden="true"></div><div id="left" aria-hidden="true"></div>
    <canvas id="heat" role="img" aria-label="A row for each token that looks, a column for each that it looks at"></canvas>
  </section>
</main>
<script id="data" type="application/json">DATA</script>
<script>
const $ = id => document.getElementById(id), maps = JSON.parse($('data').textContent)
let map, weights         // what was chosen: {name, rows, cols, weights}, and the numbers of one head or of their mean
let shown, kept          // the token that stands out, and the one to go back to: {side: 'rows' or 'cols', at: its place}

const fill = (select, names) => select.replaceChildren(...names.map((name, i) => new Option(name, i)))
const element = (tag, text) => Object.assign(document.createElement(tag), {textContent: text})
const other = {rows: 'cols', cols: 'rows'}
const between = (token, i) => token.side === 'rows' ? weights[token.at][i] : weights[i][token.at]

function chooseKind() {  // other tokens
  map = maps[$('kind').value]
  kept = undefined
  for (const side of ['rows', 'cols']) {
    $(side).dir = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/.test(map[side].join('')) ? 'rtl' : 'ltr'
    $(side).replaceChildren(...map[side].map((text, at) => {
      const button = element('button', text), token = {side, at}
      button.dir = 'auto'
      button.onpointerenter = button.onfocus = () => show(token)
      button.onpointerleave = button.onblur = () => show(kept)
      button.onclick = () => keep(token)
      return button
    }))
  }
  $('left').replaceChildren(...map.rows.map(text => element('span', text)))
  $('above').replaceChildren(...map.cols.map(text => element('span', text)))
  $('map').style.maxWidth = `${2.5 * map.cols.length + 7}rem`
  chooseHead()
}

function chooseHead() {  // other numbers
  const heads = map.weights[$('layer').value], head = $('head').value - 1, chosen = head < 0 ? heads : [heads[head]]
  weights = map.rows.map((_, i) => map.cols.map((_, j) =>
    chosen.reduce((sum, rows) => sum + rows[i][j], 0) / chosen.length / 1000))
  show(kept)
}

function show(token) {
  shown = token
  draw()
}

function keep(token) {
  kept = kept && kept.side === token.side && kept.at === token.at ? undefined : token
  show(kept)
}

function draw() {
  for (const side of ['rows', 'cols']) [...$(side).children].forEach((button, i) => {
    const weight = shown && side !== shown.side ? between(shown, i) : 0
    button.classList.toggle('shown', !!shown && side === shown.side && i === shown.at)
    button.style.setProperty('--weight', Math.sqrt(weight))
    button.dataset.number = weight >= 0.005 ? weight.toFixed(2) : ''
    button.ariaPressed = !!kept && side === kept.side && i === kept.at
  })
  drawCurves()
  drawMap()
  $('said').textContent = shown ? say(shown) : `${map.rows.length} tokens look at ${map.cols.length}`
}

function say({side, at, column}) {  // in words: the five that count most, or the one that is pointed at
  const name = text => `\u2068${text}\u2069`  // whichever way it is written, the number stands behind it
  const weigh = i => between({side, at}, i), far = map[other[side]]
  const best = column === undefined ? [...far.keys()].sort((i, j) => weigh(j) - weigh(i)).slice(0, 5) : [column]
  return `${name(map[side][at])} ${side === 'rows' ? 'looks at' : 'is looked at by'} ` +
    best.map(i => `${name(far[i])} ${weigh(i).toFixed(3)}`).join('\u2003')
}

function drawCurves() {
  const canvas = $('curves'), pen = canvas.getContext('2d'), scale = devicePixelRatio
  canvas.width = canvas.clientWidth * scale
  canvas.height = canvas.clientHeight * scale
  pen.scale(scale, scale)
  pen.strokeStyle = getComputedStyle(canvas).color
  const ends = side => [...$(side).children].map(b => [b.offsetLeft + b.offsetWidth / 2,
                                                       b.offsetTop + (side === 'rows' ? b.offsetHeight : 0)])
  const from = ends('rows'), to = ends('cols')
  weights.forEach((row, i) => row.forEach((weight, j) => {
    const mine = shown && (shown.side === 'rows' ? i : j) === shown.at
    if (weight < (shown ? 0.005 : 0.05) || (shown && !mine)) return
    const [x, y] = from[i], [u, v] = to[j], middle = (y + v) / 2
    pen.globalAlpha = shown ? Math.sqrt(weight) : weight / 2
    pen.lineWidth = 1 + 2 * weight
    pen.beginPath()
    pen.moveTo(x, y)
    pen.bezierCurveTo(x, middle, u, middle, u, v)
    pen.stroke()
  }))
}

function drawMap() {  // a pixel a weight; the style sheet makes it large
  const canvas = $('heat'), [T, S] = [map.rows.length, map.cols.length], most = Math.max(...weights.map(r => Math.max(...r)))
  $('map').classList.toggle('bare', $('map').clientWidth / (S + 6) < 11)  // no room for names
  canvas.width = S
  canvas.height = T
  const pen = canvas.getContext('2d'), image = pen.createImageData(S, T)
  const [ink, paper] = [getComputedStyle(canvas).color, getComputedStyle(document.body).backgroundColor]
    .map(colour => colour.match(/\d+/g).map(Number))
  weights.flat().forEach((weight, n) => {
    const dim = shown && (shown.side === 'rows' ? Math.floor(n / S) : n % S) !== shown.at
    const part = Math.sqrt(weight / most) * (dim ? 0.35 : 1)
    for (let c = 0; c < 3; c++) image.data[4 * n + c] = paper[c] + part * (ink[c] - paper[c])
    image.data[4 * n + 3] = 255
  })
  pen.putImageData(image, 0, 0)
}

const cell = event => {
  const box = $('heat').getBoundingClientRect()
  const place = (x, size, n) => Math.max(0, Math.min(n - 1, Math.floor(x / size * n)))
  return {side: 'rows', at: place(event.clientY - box.top, box.height, map.rows.length),
          column: place(event.clientX - box.left, box.width, map.cols.length)}
}
$('heat').onpointermove = event => show(cell(event))
$('heat').onpointerleave = () => show(kept)
$('heat').onclick = event => keep({...cell(event), column: undefined})
fill($('kind'), maps.map(map => map.name))
fill($('layer'), maps[0].weights.map((_, i) => i + 1))
fill($('head'), ['mean of heads', ...maps[0].weights[0].map((_, i) => i + 1)])
$('kind').onchange = chooseKind
$('layer').onchange = $('head').onchange = chooseHead
matchMedia('(prefers-color-scheme: dark)').onchange = draw
chooseKind()
new ResizeObserver(draw).observe($('lines'))
</script>
</html>
"""


def attention_page(maps):
    """
    {name: (tokens that look, T; tokens looked at, S; weights (layers, H, T, S))} -> a page to explore them, HTML that needs
    nothing else. Weights stand in it in thousandths.
    """
    data = [{'name': name, 'rows': rows, 'cols': cols, 'weights': np.rint(1000 * weights).astype(int).tolist()}
            for name, (rows, cols, weights) in maps.items()]
    return PAGE.replace('DATA', json.dumps(data, ensure_ascii=False, separators=(',', ':')).replace('<', r'\u003c'), 1)


def attention_picture(maps):
    """The same -> a PNG: a row of maps for each layer, a column for each head. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError:
        raise ValueError("a .png needs one more package: pip install matplotlib (a .html needs none)") from None
    grid = [(f'{name} {layer + 1}', rows, cols, heads)
            for name, (rows, cols, weights) in maps.items() for layer, heads in enumerate(weights)]
    named = max(len(tokens) for _, *both, _ in grid for tokens in both) <= 32  # more names than that could not be read
    side, n_head = 3.2 if named else 1.6, len(grid[0][3])                              # inches
    figure = Figure((side * n_head, side * len(grid)), dpi=100, layout='constrained')
    for row, (name, rows, cols, heads) in zip(figure.subplots(len(grid), n_head, squeeze=False), grid):
        for head, (axes, weights) in enumerate(zip(row, heads)):
            axes.imshow(weights ** 0.5, cmap='Blues', vmin=0)
            axes.set_title(f'{name}, head {head + 1}', fontsize=8)
            for axis, tokens in ((axes.xaxis, cols), (axes.yaxis, rows)):
                axis.set_ticks(range(len(tokens)) if named else [], tokens if named else [], fontsize=6, parse_math=False)
            axes.tick_params(axis='x', rotation=90)
    file = io.BytesIO()
    with warnings.catch_warnings(action='ignore'):  # characters that its font lacks
        figure.savefig(file, format='png')
    return file.getvalue()


def print_attention(model, tokenizer, prompt, task, labels, settings):
    """Write the file that --attention names, whole or not at all, and say so on standard error."""
    example, left_out = to_look_at(model, tokenizer, prompt, task, labels, settings.max_new_tokens)
    device, spell = next(model.parameters()).device, lambda ids: [spell_token(tokenizer, i) for i in ids]
    read, target = spell(example['ids']), spell(example.get('decoder_ids', []))
    sides = {'encoder': (read, read), 'decoder': (target, target), 'cross': (target, read)}
    if not target:
        sides['decoder'] = sides['encoder']
    batch = {key: t.to(device) for key, t in collate([example], tokenizer._special_tokens['[PAD]']).items()}
    maps = {name: (*sides[name], weights[:, 0]) for name, weights in attention_maps(model, batch).items()}
    made = attention_picture(maps) if settings.attention.lower().endswith('.png') else attention_page(maps).encode()
    write_file(settings.attention, lambda f: f.write(made))
    layers, heads = next(iter(maps.values()))[2].shape[:2]
    print(f"{settings.attention}: {layers} layers of {heads} heads, {len(read)} tokens{left_out}"
          + f", {len(target)} of what it writes" * bool(target), file=sys.stderr)

# -----------------------------------------------------------------------------
# The script

DTYPES = ('float32', 'bfloat16', 'float16', 'int8')


class Packed(torch.nn.Module):
    """
    A Linear or Output on a CPU, for use alone. To write a token is to read all weights once, so what counts is how fast that
    goes: laid out as oneDNN wants them, 1.4 (bfloat16) to 2 times (float32) as fast as by F.linear. int8: whole numbers from
    -127 to 127, times a scale for each row of the matrix; half the bytes of bfloat16, which goes in and out.
    """

    def __init__(self, layer, dtype):
        super().__init__()
        weight = layer.weight.detach().float().contiguous()                            # (out, in)
        self.before, self.cap = getattr(layer, 'scale', 1.0), getattr(layer, 'cap', 0.0)  # of an Output
        self.dtype, self.scale = torch.bfloat16 if dtype == 'int8' else getattr(torch, dtype), None
        self.bias = None if layer.bias is None else layer.bias.detach().to(self.dtype)
        if dtype == 'int8':
            scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127                    # (out,)
            self.weight, self.scale = (weight / scale[:, None]).round().to(torch.int8), scale.to(self.dtype)
        else:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype), None)

    def forward(self, x, rows=None):
        x = x if self.before == 1.0 else x * self.before
        if self.scale is None:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')
        elif x.numel() <= 16 * x.size(-1):
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).unflatten(0, x.shape[:-1])
        else:  # many rows at once: now the products cost more than reading the weights
            y = torch.nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale
        if self.scale is not None and self.bias is not None:
            y = y + self.bias
        return self.cap * torch.tanh(y.float() / self.cap) if self.cap else y


def cast(model, dtype):
    """The model with its weights in a dtype, for reading alone. Raises ValueError where the device has no such weights."""
    on_cpu = next(model.parameters()).is_cpu
    if dtype == 'int8' and not on_cpu:
        raise ValueError("--dtype int8 is for a CPU: leave it out, or add --device cpu")
    # all but the matrices of cross-attention that are read in parts
    layers = [(module, name, child) for path, module in model.named_modules() for name, child in module.named_children()
              if isinstance(child, (torch.nn.Linear, Output)) and not (path.endswith('cross') and name == 'qkv')]
    if on_cpu and (dtype == 'int8' or (torch.backends.mkldnn.is_available() and dtype != 'float16')):
        with contextlib.suppress(RuntimeError):  # a CPU that oneDNN has no layout for keeps the weights as they are
            packed = [Packed(child, dtype) for _, _, child in layers]
            for (module, name, _), layer in zip(layers, packed):
                setattr(module, name, layer)
    return model.to(torch.bfloat16 if dtype == 'int8' else getattr(torch, dtype)).eval()


@dataclass
class Settings:
    """The flags of this script."""
    start: str = flag('', 'what to continue: a text, FILE:path, or - for standard input; nothing: a new document')
    out_dir: str = flag('out', 'the folder that train.py wrote')
    init_from: str = flag('', 'what to use instead of out_dir: a checkpoint, a Hugging Face folder, or a name on the hub')
    num_samples: int = flag(1, 'how many texts of a GPT; with beams, so many of the best', low=1)
    max_new_tokens: int = flag(200, 'tokens in a text, at most', low=1)
    temperature: float = flag(None, '0 takes the likeliest token, 1 draws as the model says [0.8; text to text: 0]', low=0,
                              kind=float)
    num_beams: int = flag(1, 'continuations followed at once; above 1 the likeliest text is searched for', low=1, high=4096)
    length_penalty: float = flag(1.0, 'of beams: the power of the length by which log-probabilities are divided', low=0)
    top_k: int = flag(0, 'draw from the k likeliest tokens; 0: from all. For [MASK]: show so many; 0: five', low=0)
    top_p: float = flag(1.0, 'draw from the fewest likeliest tokens that reach this probability', low=0, high=1)
    stop: list = flag([], 'texts at which to stop')
    seed: int = flag(-1, 'the same seed writes the same text; -1: a new one every time', low=-1)
    stream: bool = flag(False, 'print text as it is written, one sample after the other')
    score: str = flag('', 'a file to score instead: a text, or labelled rows as prepare_data.py reads them')
    json: bool = flag(False, 'print JSON objects, one a line')
    export: str = flag('', 'write the model into this folder, as the classes of transformers load it, and do nothing else')
    attention: str = flag('', 'a file, .html or .png: draw who looks at whom in the text of --start, and do nothing else')
    device: str = flag('auto', 'where to compute', choices=('auto', 'cpu', 'cuda', 'mps'))
    dtype: str = flag('auto', 'of the weights; auto: bfloat16 to write on a GPU that has it, else float32',
                      choices=('auto', *DTYPES))

    def __post_init__(self):
        check_flags(self)
        if self.num_beams > 1 and (self.temperature or self.top_k or self.top_p < 1):
            raise ValueError(f"--num_beams {self.num_beams} searches for the likeliest text, and --temperature, --top_k and "
                             "--top_p draw one: leave one of the two out")
        if self.attention and not self.attention.lower().endswith(('.html', '.png')):
            raise ValueError(f"--attention {self.attention}: choose a name that ends in .html, for a page, or in .png")
        if self.attention and (self.score or self.export):
            raise ValueError(f"--attention {self.attention} does nothing else: leave --score and --export out")
        if 1 < self.num_beams < self.num_samples:
            raise ValueError(f"--num_samples {self.num_samples}: a search with --num_beams {self.num_beams} finds no more "
                             "texts than beams: raise it")


def open_model(path, device='cpu', **changes):
    """`load` of model.py, with what it leaves out: the tokenizer that belongs to a Hugging Face folder or to nanoGPT."""
    model, checkpoint = load(path, device, **changes)
    if 'tokenizer' not in checkpoint:
        tokenizer = None
        with contextlib.suppress(FileNotFoundError):
            if 'folder' in checkpoint:
                tokenizer = load_tokenizer(checkpoint['folder'])
            elif model.config.vocab_size in (50257, 50304):  # nanoGPT rounds it up
                tokenizer = gpt2_tokenizer()
        checkpoint['tokenizer'] = tokenizer and tokenizer_to_dict(tokenizer)
    return model, checkpoint


def export(model, tokenizer, labels, folder):
    """Write model and tokenizer as a Hugging Face folder. Rows that were added to a vocabulary of GPT-2 stay behind."""
    special, size = tokenizer._special_tokens, model.config.vocab_size
    if tokenizer.name == 'gpt2' and model.config.arch == 'gpt':
        size = min(size, special['[PAD]'])  # the first that was added
    files = export_tokenizer(tokenizer, size)
    end_id = special['<|endoftext|>']
    ids = {'eos_token_id': end_id, 'bos_token_id': special.get('<|start|>', end_id), 'pad_token_id': special['[PAD]']}
    if hasattr(model, 'read'):
        ids['decoder_start_token_id'] = ids.pop('bos_token_id')
    if labels:
        ids |= {'id2label': dict(enumerate(labels)), 'label2id': {label: i for i, label in enumerate(labels)}}
    export_huggingface(model, folder, size, **{name: i for name, i in ids.items() if isinstance(i, dict) or i < size})
    for name, data in files.items():
        write_json(os.path.join(folder, name), data)


def find_device(name):
    """auto -> the best there is. Raises ValueError where the machine lacks what is asked for."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        return next(device for device in there if there[device])
    if not there[name]:
        raise ValueError(f"--device {name}: this machine or this torch has none: use --device auto")
    return name


def read_start(start):
    """The prompt that --start names. Raises ValueError or OSError."""
    if start == '-':
        data, name = sys.stdin.buffer.read(), 'standard input'
    elif start.startswith('FILE:'):
        name = start.removeprefix('FILE:')
        with open(name, 'rb') as f:
            data = f.read()
    else:
        return start
    try:
        text = data.decode('utf-8').removeprefix('\ufeff')
        return text.replace('\r\n', '\n').replace('\r', '\n')  # as prepare_data.py reads
    except UnicodeDecodeError as e:
        raise ValueError(f"{name} is not UTF-8: the byte at offset {e.start} cannot be read as text") from None


def print_texts(model, tokenizer, prompt, settings):
    """Write the samples to standard output, and how fast it went to standard error."""
    if settings.num_beams > 1:
        for i, (score, text) in enumerate(write_beams(model, tokenizer, prompt, settings)):
            if settings.json:
                print(json.dumps({'prompt': prompt, 'text': text, 'score': score}, ensure_ascii=False))
            else:
                print(('---\n' if i else '') + prompt + text)
        return
    began, n_tokens = time.perf_counter(), 0
    n = settings.num_samples
    groups = [(row, 1) for row in range(n)] if settings.stream else [(0, n)]  # a stream shows one at a time
    for first, rows in groups:
        texts = [''] * rows
        if settings.stream and not settings.json:
            print(('---\n' if first else '') + prompt, end='', flush=True)
        for row, text in write(model, tokenizer, prompt, settings, first, rows):
            texts[row] += text
            n_tokens += 1
            if settings.stream and not settings.json:
                print(text, end='', flush=True)
            else:
                progress(f"{n_tokens} of {n * settings.max_new_tokens} tokens")
        n_tokens -= rows  # the last of each row is what still waited, not a token
        progress('')
        if settings.stream and not settings.json:
            print()
        for row, text in enumerate(texts):
            if settings.json:
                print(json.dumps({'prompt': prompt, 'text': text}, ensure_ascii=False))
            elif not settings.stream:
                print(('---\n' if row else '') + prompt + text)
    seconds = time.perf_counter() - began
    print(f"{n_tokens} tokens in {seconds:.2f} s ({n_tokens / seconds:.1f} tok/s)", file=sys.stderr)


WORDS = regex.compile(CJK.pattern + r'|[\p{L}\p{N}\p{M}_@#](?:(?!' + CJK.pattern + r')\S)*(?<=[\p{L}\p{N}\p{M}_])|\S')


def read_line(task, line):
    """What a user writes -> a row as the readers of prepare_data.py make them, without its labels. Raises ValueError."""
    texts = [text.strip() for text in line.split('|||')]
    if task == 'tag':
        return {'tokens': WORDS.findall(line)}
    if task == 'qa' and (len(texts) != 2 or not all(texts)):
        raise ValueError(f"{line[:60]!r}: write question ||| context")
    if task == 'seq2seq':
        return {'source': line}
    if len(texts) > 2 or not all(texts):
        raise ValueError(f"{line[:60]!r}: write one text, or two as a ||| b")
    return dict(zip(('question', 'context') if task == 'qa' else ('text', 'text_b'), texts))


def show(found):
    """An answer as one line of text."""
    if 'guesses' in found:
        plain = lambda text: text if text.isprintable() else repr(text)
        return ' | '.join(', '.join(f'{plain(text)} {p:.3f}' for text, p in guesses) for guesses in found['guesses'])
    if 'label' in found:
        return f"{' '.join(found['label'].split())} {found['probability']:.4f}"
    if 'tags' in found:
        tagged = ' '.join(f'{token}/{tag}' for token, tag in zip(found['tokens'], found['tags']))
        return '\t'.join([tagged, '; '.join(f"{e['kind']}: {e['text']}" for e in found['entities'])]).rstrip()
    return ' '.join(found['target' if 'target' in found else 'answer'].split())


def print_answers(model, tokenizer, prompt, task, labels, settings):
    """Answer each line of the prompt with a line on standard output; an empty one with an empty one."""
    began, pad_id = time.perf_counter(), tokenizer._special_tokens['[PAD]']
    lines = [line.strip() for line in prompt.removesuffix('\n').split('\n')]
    asked = [n for n, line in enumerate(lines) if line]
    if not asked:
        raise ValueError("--start is empty: give a text, FILE:path, or - for standard input")
    rows = []
    for n in asked:  # all are read before the first is answered
        try:
            if task:
                made = encode_rows(tokenizer, task, [read_line(task, lines[n])], labels, model.config.block_size)
            else:
                made = [masked_text(tokenizer, lines[n], model.config.block_size)]
        except ValueError as e:
            raise ValueError(f"line {n + 1}: {e}" if len(lines) > 1 else str(e)) from None
        for example in made:
            example['about']['row'] = n
        rows.append(made)
    printed = 0
    for at in range(0, len(asked), 1024):
        examples = [example for row in rows[at:at + 1024] for example in row]
        if task == 'seq2seq':
            answers = write_targets(model, tokenizer, examples, settings)
        elif task:
            answers, _, _ = answer(model, examples, task, labels, pad_id)
        else:
            best = lambda example, logits: read_masks(tokenizer, example, logits, settings.top_k or 5)
            guesses, _, _ = ask(model, examples, pad_id, best, rows=8)
            answers = [{'guesses': masks} for masks in guesses]
        for n, found in zip(asked[at:at + 1024], answers):
            print('\n' * (n - printed), end='')
            print(json.dumps({'text': lines[n], **found}, ensure_ascii=False) if settings.json else show(found))
            printed = n + 1
    print('\n' * (len(lines) - printed), end='')
    seconds = time.perf_counter() - began
    print(f"{len(asked)} answer{'s' * (len(asked) != 1)} in {seconds:.2f} s ({len(asked) / seconds:.1f} a second)",
          file=sys.stderr)


def main(argv):
    settings = Settings(**read_flags(argv, __doc__, {'flags': Settings}))
    device = find_device(settings.device)
    if settings.seed < 0:
        settings.seed = int.from_bytes(np.random.default_rng().bytes(4), 'little')
    prompt = '' if settings.score or settings.export else read_start(settings.start)
    path = settings.init_from or settings.out_dir
    if not settings.init_from and not os.path.exists(path):
        raise FileNotFoundError(f"there is no folder {path}: train a model first, with python train.py")
    model, checkpoint = open_model(path, device)
    if not checkpoint.get('tokenizer'):
        raise ValueError(f"{path} has no tokenizer: it cannot read or write text")
    tokenizer = tokenizer_from_dict(checkpoint['tokenizer'])
    task, labels = checkpoint.get('task', ''), checkpoint.get('labels', [])
    if settings.export:
        export(model, tokenizer, labels, settings.export)
        print(f"{settings.export}: a model and its tokenizer, as transformers loads them")
        return
    exact = settings.score or settings.attention
    half = device == 'cuda' and not exact and torch.cuda.is_bf16_supported(including_emulation=False)
    model = cast(model, ('bfloat16' if half else 'float32') if settings.dtype == 'auto' else settings.dtype)
    task = task or ('seq2seq' if hasattr(model, 'read') else '')  # an encoder-decoder always answers a text with a text
    if settings.attention:
        print_attention(model, tokenizer, prompt, task, labels, settings)
        return
    if not task and 'output.bias' in checkpoint.get('new', []):
        raise ValueError(f"{path} is an encoder without a head, which has nothing to say: fine-tune it first, with "
                         f"python train.py --init_from {path}")
    if settings.score:
        scores = score_file(model, tokenizer, settings.score, task, labels, settings)
        print(json.dumps(scores) if settings.json else format_scores(scores))
    elif task or not hasattr(model, 'decode'):
        print_answers(model, tokenizer, prompt, task, labels, settings)
    else:
        print_texts(model, tokenizer, prompt, settings)


if __name__ == '__main__':
    run(main)
