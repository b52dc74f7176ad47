"""
Use a trained model. --start is the input; the output depends on what the model was trained for.
A GPT or LSTM continues the text:

    python sample.py --start "The import statement"
    python sample.py --start FILE:poem.txt --num_samples 3 --temperature 0.9 --top_p 0.95 --seed 1
    printf "To be" | python sample.py --start - --stream

Standard output gets only the texts, with a line of three dashes between samples. BERT, translators
and fine-tuned models answer each line of --start with one (or with --num_samples translations):

    python sample.py --out_dir out-bert --start "The [MASK] statement"          fill each [MASK]
    python sample.py --out_dir out-reviews --start FILE:reviews.txt             label, probability
    python sample.py --out_dir out-squad --start "Who won? ||| The dog won."    answer in a context
    python sample.py --out_dir out-en-de --start "A dog runs." --num_beams 5    translate

The script can also score a model on a file, or write a page that shows the attention weights:

    python sample.py --score FILE
    python sample.py --start "The import statement" --attention page.html

The file goes from batches and the choice of tokens over text, answers (DECODERS), scores (SCORES)
and attention to what makes decoding faster, and the script.
"""

import collections
import contextlib
import functools
import itertools
import json
import math
import os
import re
import string
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import regex
import torch
from torch.nn.utils.rnn import pad_sequence

from model import (IGNORE_INDEX, Attention, KVCache, export_huggingface, load, num_parameters,
                   require, write_file)
from prepare_data import (CJK, TASKS, WIDE, Tokenizer, add_special_tokens, check_flags, encode_rows,
                          flag, load_tokenizer, new_folder, pick, progress, read_any, read_flags,
                          read_pieces, render_token, run, split_cjk, to_stderr, write_ids,
                          write_json)

# -----------------------------------------------------------------------------
# Batches

def collate(examples, pad_id, device='cpu'):
    """
    A list of examples -> a batch, a dict of tensors. Rows of unequal length are padded on the
    right; then attention_mask (B, T), bool, tells which tokens are real. `meta` is left out.

        ids    7 8 9        attention_mask    T T T
               5 6 PAD                        T T F
    """
    batch = {}
    for key in examples[0]:  # in a fixed order: processes of train.py sum targets key by key
        if key == 'meta':
            continue
        rows = [torch.as_tensor(np.array(example[key])) for example in examples]
        fill = pad_id if key.endswith('ids') else IGNORE_INDEX if key.endswith('targets') else 0
        batch[key] = (pad_sequence(rows, batch_first=True, padding_value=fill) if rows[0].dim()
                      else torch.stack(rows))
    lengths = torch.tensor([len(example['ids']) for example in examples])
    if lengths.min() < lengths.max():
        batch['attention_mask'] = torch.arange(lengths.max()) < lengths[:, None]
    return {key: t.to(device) for key, t in batch.items()}

@contextlib.contextmanager
def evaluating(model):
    """No dropout and no gradients inside the `with` block; afterwards both are as they were."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, was_training in modes:  # a module comes before those in it
            model.train(was_training)

def device_of(model):
    return next(model.parameters()).device

def by_length(texts, batch_size, same_length=False):
    """
    Yields lists of at most batch_size indices of texts (lists of ids). The texts of one list have
    about the same length (same_length=True: exactly), so they need little padding. Shows progress.
    """
    rest = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    while rest:
        progress(f"{len(texts) - len(rest):,} of {len(texts):,}")
        size = len(texts[rest[0]])
        chosen = [i for i in rest[:batch_size] if not same_length or len(texts[i]) == size]
        del rest[:len(chosen)]
        yield chosen
    progress('')

# -----------------------------------------------------------------------------
# Choosing tokens

NOT_FINITE = "the model's logits are not finite: its weights are damaged, or too large for --dtype"

def check_finite(*tensors):
    """Raise ValueError unless all values are finite: argmax returns an index even for NaN."""
    require(all(t.isfinite().all() for t in tensors), NOT_FINITE)

def next_logits(model, ids, cache, suppressed):
    """Newest tokens (B, T) -> logits of the next one (B, V), -inf where suppressed (V,) is true."""
    logits = model.decode(ids, cache)
    return logits if suppressed is None else logits.masked_fill(suppressed, -math.inf)

def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """
    logits (B, V), uniform (B,) drawn from [0, 1) -> tokens (B,). A pure function of its arguments.

    temperature divides the logits: below 1 likely tokens get likelier; 0 takes the likeliest one.
    top_k       keeps the k likeliest tokens, exactly k even where several are equally likely; 0
                keeps all (Fan et al. 2018, https://arxiv.org/abs/1805.04833)
    top_p       keeps the nucleus: the fewest likeliest tokens whose probabilities together reach p,
                the crossing token included; 1: all (Holtzman et al. 2019, arxiv.org/abs/1904.09751)
    """
    if temperature < 1e-300:  # 0, or so small that a quotient might be infinite
        return logits.argmax(dim=-1)
    order, V = None, logits.size(-1)
    if top_k or top_p < 1:
        logits, order = logits.topk(min(top_k or V, V))                    # likeliest first
    # double: float32 could round a draw up to 1, or overflow where the temperature is small
    p = (logits.double() / temperature).softmax(dim=-1)
    if top_p < 1:
        p = p * (p.cumsum(dim=-1) - p < top_p)  # keep a token if all likelier ones sum to < top_p
    cumulated = p.cumsum(dim=-1)
    threshold = uniform[:, None] * cumulated[:, -1:]  # take the first token whose sum is above
    index = torch.searchsorted(cumulated, threshold, right=True) % p.size(-1)  # none above: 0
    return (index if order is None else order.gather(1, index))[:, 0]

SAMPLING = 'temperature top_k top_p seed'  # flags that sample_token and generate read

@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=0.8, *, seed=0, rows=None,
             suppressed=None, end_ids=(), cache=None, **filters):
    """
    Continue ids (B, T): yields the next tokens (B,), at most max_new_tokens times. Row i has its
    own random numbers, from the seed (seed, rows[i]), or (seed, i) without rows. So its text is the
    same in any batch (in eval mode). Tokens in suppressed (V,) bool are never chosen. A row that
    has chosen a token of end_ids has ended and repeats this token; when all rows have ended, the
    function returns. filters: top_k and top_p of sample_token.

    With the cache each step reads only the newest token. When the window of block_size tokens is
    full, its newer half is read again from position 0 and the older half is forgotten. cache: the
    KVCache of an encoded source, used once: prompt and new tokens must then fit into block_size.
    """
    block_size, device = model.config.block_size, ids.device
    draws = [np.random.default_rng((seed, row)).random(max_new_tokens)
             for row in rows or range(len(ids))]
    # (max_new_tokens, B), on the device where step() chooses tokens: not mps, which lacks float64
    uniforms = torch.tensor(np.array(draws).T, device='cpu' if ids.is_mps else device)

    def step(new, uniform):
        logits = next_logits(model, new, cache, suppressed).to(uniform.device)  # (B, V)
        chosen = sample_token(logits, uniform, temperature, **filters)
        return chosen.where(logits.amax(dim=-1).isfinite(), -1)            # -1 raises below

    texts = batch = ids.tolist()                             # batch: those of them to go on with
    new, read = ids[:, -block_size:].tolist(), 0             # new: to read; read: now in cache
    size = (len(new[0]) + max_new_tokens + 15) // 16 * 16    # kernels are fast at multiples of 16
    cache = cache or KVCache(min(block_size, size))
    as_graph, replay = ids.is_cuda and model.config.arch != 'lstm', None  # see capture (below)
    for i in range(max_new_tokens):
        if read + len(new[0]) > block_size:
            new, read = [text[-max(1, block_size // 2):] for text in batch], 0
            cache.clear()
        read += len(new[0])
        if as_graph and len(new[0]) == 1:
            replay = replay or capture(step, cache, new, uniforms)
            tokens = replay(new, i, read < block_size and i + 1 < max_new_tokens)
        else:
            tokens = step(ids.new_tensor(new), uniforms[i]).tolist()
        require(min(tokens) >= 0, NOT_FINITE)
        for text, token in zip(batch, tokens):
            has_ended = i and text[-1] in end_ids  # at i = 0, text[-1] is the prompt's
            text.append(text[-1] if has_ended else token)
        yield torch.tensor([text[-1] for text in texts])
        rest = [k for k, text in enumerate(batch) if text[-1] not in end_ids]
        if not rest:
            return
        if len(rest) < len(batch) and not as_graph:  # the shapes of a graph are fixed
            batch, uniforms = [batch[k] for k in rest], uniforms[:, rest]
            cache.reorder(rest)
        new = [text[-1:] for text in batch]

@torch.no_grad()
def beam_search(model, ids, beams, max_new_tokens, length_penalty=1.0, suppressed=None, end_ids=(),
                cache=None):
    """
    The likeliest continuations of ids (B, T): for each row a list of at most `beams` (score,
    tokens), best first. Each step extends the `beams` best unfinished texts of a row by every token
    and keeps the best again; a text that ends while among the best is finished. The score is
    log P(tokens) / length^length_penalty, the end token counted (Wu et al. 2016, section 7, earlier
    form, https://arxiv.org/abs/1609.08144). A row is done when no unfinished text, if it ended now,
    would beat the worst of `beams` finished ones. After max_new_tokens all texts count as finished.
    With two beams, the best texts after "a", and their log P:

        step 1    cat -0.9        dog -1.1
        step 2    cat sat -1.5    dog <end> -1.8: finished, score -1.8 / 2    cat ran -2.0
        step 3    of all that begins with "cat sat" or "cat ran"
    """
    cache, rows, newest = cache or KVCache(ids.size(1) + max_new_tokens), [*range(len(ids))], ids
    # rows: those not done. Each begins with one empty text; later all have equally many, <= beams.
    texts, log_ps, finished = [[] for _ in rows], [0.0] * len(rows), [[] for _ in rows]
    for length in range(1, max_new_tokens + 1):
        logits = next_logits(model, newest, cache, suppressed)  # (B width, V), width: texts per row
        check_finite(logits.amax(dim=-1))
        V, width, divisor = logits.size(-1), len(texts) // len(rows), length ** length_penalty
        following = logits.float().log_softmax(dim=-1)
        total = following + following.new_tensor(log_ps)[:, None]
        total = total.view(len(rows), -1)                                  # (B, width V)
        # A text can end in len(end_ids) ways, so of these candidates at least `beams` go on.
        best, places = total.topk(min((1 + len(end_ids)) * beams, total.size(1)))
        longer, rest = [], []
        for i, row in enumerate(rows):
            found, unfinished = finished[row], []
            for rank, (log_p, place) in enumerate(zip(best[i].tolist(), places[i].tolist())):
                parent, token = i * width + place // V, place % V
                ends = token in end_ids
                text = texts[parent] if ends else [*texts[parent], token]
                if not ends and length < max_new_tokens:
                    unfinished.append((log_p, parent, text))
                elif rank < beams and log_p > -math.inf:
                    found.append((log_p / divisor, text))                  # normalised by length
            found.sort(reverse=True)
            del found[beams:]
            to_beat = -math.inf if len(found) < beams else found[-1][0]
            if unfinished and unfinished[0][0] / divisor > to_beat:
                longer += unfinished[:beams]
                rest.append(row)
        if not rest:
            break
        # same: all rows go on, with as many texts as before; then the source need not be reordered.
        same = rest == rows and len(longer) == len(texts)
        log_ps, parents, texts = zip(*longer)
        cache.reorder(ids.new_tensor(parents), source=not same)
        rows, newest = rest, ids.new_tensor([text[-1:] for text in texts])
    return finished

# -----------------------------------------------------------------------------
# Text

class TextStream:
    """
    Turns tokens into text, one at a time: add() decodes all tokens again and returns the new text.
    It holds back an incomplete character, and what may be the beginning of a stop text. `done` is
    true after an end token, or a stop text (cut off). score, tokens: a text found by beam_search.
    """

    def __init__(self, tokenizer, prompt=(), stops=(), score=None, tokens=()):
        self.ids, self.text, self.done, self.ends = [], '', False, tokenizer.end_ids
        begin = len(tokenizer.decode(prompt))                              # of the new text
        self.decode = lambda ids: tokenizer.decode([*prompt, *ids])[begin:]
        # Leave out a stop text that contains another one before its end: the other one comes first.
        self.stops = [stop for stop in stops if not any(other in stop[:-1] for other in stops)]
        if score is not None:
            self.score = score
            self.add(*tokens, tokenizer.end_id)

    def add(self, *tokens):
        """Returns the text that these tokens make certain; after an end token, all the rest."""
        if self.done:
            return ''
        self.done = tokens[-1] in self.ends
        self.ids += [token for token in tokens if token not in self.ends]
        # '\ufffd' at the end is half a character; Llama's decoder spoils whole ones before it, too.
        whole = clean = self.decode(self.ids)
        rest = self.ids
        while clean.endswith('\ufffd'):
            rest = rest[:-1]
            clean = self.decode(rest)
        text = max(clean, whole.rstrip('\ufffd'), key=len)                 # what is certain
        if self.done:
            text += whole[len(text):]
        found = self.stops and regex.search(r'\L<stops>', text, partial=not self.done,
                                            stops=self.stops)              # any of this list
        if found:  # text ends before a stop text; at its end the beginning of one is held back
            text, self.done = text[:found.start()], self.done or not found.partial
        new = text[len(self.text):]
        self.text += new
        return new

    def to_dict(self):
        return pick(vars(self), 'text', 'score')

def suppressed_tokens(model, tokenizer, ends=True):
    """(V,) bool: True for ids without a token, and special tokens (ends=True: except end_ids)."""
    hidden, ends = {*tokenizer.special.values()}, tokenizer.end_ids if ends else ()
    suppressed = [i not in ends and (i >= tokenizer.n_vocab or i in hidden)
                  for i in range(model.config.vocab_size)]
    return torch.tensor(suppressed, device=device_of(model))

@torch.inference_mode()
@torch.autocast('cpu', enabled=False)  # a product with one token is slow in bfloat16
def write_batch(model, tokenizer, prompts, sources, rows, settings):
    """
    Continue prompts, lists of ids of equal length. sources: for text to text, the ids of the source
    of each (an encoder reads them; without one they are in the prompt, too); else []. Returns for
    each prompt a list of TextStream: one drawn by (seed, its number in rows), or its best beams.
    With --stream the first text is printed as it grows. Beams and targets must fit into block_size
    tokens: beams cut the start of long prompts.
    """
    ids, cache = torch.tensor(prompts, device=device_of(model)), None
    beams, block_size = settings.num_beams, model.config.block_size
    length = settings.max_new_tokens or 200
    if beams > 1 and not sources:
        room = block_size - min(length, block_size // 2)
        ids = ids[:, -room:]
    if beams > 1 or sources:
        length = max(1, min(length, block_size - ids.size(1)))
    if model.config.arch == 'encdec':
        batch = collate([{'ids': source} for source in sources], tokenizer.pad_id, ids.device)
        cache = model.encode(**batch, size=min(block_size, (length // 16 + 1) * 16))
    options = {'cache': cache, 'end_ids': tokenizer.end_ids,
               'suppressed': suppressed_tokens(model, tokenizer)}
    before = [()] * len(ids) if sources else prompts  # a target does not continue its prompt
    if beams > 1:
        found = beam_search(model, ids, beams, length, settings.length_penalty, **options)
        return [[TextStream(tokenizer, prompt, settings.stop, *text)
                 for text in texts[:settings.num_samples]] for prompt, texts in zip(before, found)]
    streams = [TextStream(tokenizer, prompt, settings.stop) for prompt in before]
    options |= pick(vars(settings), *SAMPLING.split())
    steps = generate(model, ids, length, rows=rows, **options)             # each (B,)
    if not (settings.stop or settings.stream):  # as one step: the text is needed only at the end
        steps = [torch.stack([*steps], dim=1)]                             # (B, T)
    ends = torch.full((len(ids), 1), tokenizer.end_id)         # releases text that is held back
    for step in itertools.chain(steps, [ends]):
        tokens = step.view(len(ids), -1).tolist()
        new_texts = [stream.add(*row) for stream, row in zip(streams, tokens)]
        if settings.stream:
            print(new_texts[0], end='', flush=True)
        if all(stream.done for stream in streams):
            break
    return [[stream] for stream in streams]

def write_targets(model, tokenizer, examples, settings):
    """
    Text to text: returns for each source a list of num_samples TextStreams (of beams, the best
    first). A decoder without an encoder reads the source as a prompt that ends in [SEP].
    """
    config, results, cut = model.config, [[] for _ in examples], 0
    encoder, size = config.arch == 'encdec', config.block_size
    repeat = 1 if settings.num_beams > 1 else settings.num_samples
    lengths = [len(example.get('decoder_ids', ())) for example in examples]  # of known targets
    fit = all(len(e['ids']) + length <= 1 + size for e, length in zip(examples, lengths))
    require(encoder or fit, "the longest source and target are too long together for block_size="
            f"{size}: leave them out")
    settings = replace(settings, max_new_tokens=settings.max_new_tokens or max(lengths, default=0))
    sources = [example['ids'] for example in examples for _ in range(repeat)]
    floats = config.n_layer * config.n_embd * (settings.max_new_tokens or 200)  # keys of a text
    batch_size = 1 + min(1024, 2 ** 28 // floats) // settings.num_beams  # keys and values: 2 GB
    for rows in by_length(sources, batch_size, same_length=not encoder):
        batch = [sources[row] for row in rows]
        prompts = [[tokenizer.start_id] if encoder else [*ids[:-1], tokenizer.id('[SEP]')]
                   for ids in batch]
        seeds = [row // repeat + (row % repeat << 32) for row in rows]     # source + sample * 2^32
        for row, texts in zip(rows, write_batch(model, tokenizer, prompts, batch, seeds, settings)):
            results[row // repeat] += texts
            cut += sum(len(text.ids) >= min(200, size - len(prompts[0])) for text in texts)
    if cut and not settings.max_new_tokens:
        to_stderr(f"{cut} texts fill block_size={size} or 200 tokens: they may be cut")
    return results

# -----------------------------------------------------------------------------
# Answers. A row (of a file, or a line of --start) that is long may be cut into several examples. A
# function of DECODERS turns the logits of all examples of a row into its answer, a dict.

def predict(model, examples, pad_id, postprocess=None, batch_size=64):
    """
    Returns (results, totals). results[i] is postprocess(examples[i], its logits), or None without
    postprocess. totals[kind], for each kind of targets that the examples have, is an array (sum of
    the losses in nats, number of targets, number guessed right).
    """
    results, totals, config = [None] * len(examples), collections.defaultdict(float), model.config
    if not config.task:  # a batch has B T V logits, which have to fit into memory
        max_logits = 2 ** 28 if device_of(model).type == 'cuda' else 2 ** 26
        batch_size = min(batch_size, 1 + max_logits // (config.block_size * config.vocab_size))
    for chosen in by_length([example['ids'] for example in examples], batch_size):
        batch = collate([examples[i] for i in chosen], pad_id, device_of(model))
        kinds = [key for key in batch if key.endswith('targets')]
        for kind in kinds or ['targets']:  # BERT returns the logits of one kind a call
            inputs = {key: batch[key] for key in batch if key == kind or key not in kinds}
            with evaluating(model):
                logits, loss = model(**inputs, **{f'num_{kind}': 1})       # the sum, not a mean
            check_finite(logits)
            if kinds:
                guesses, targets = logits.argmax(dim=-1), batch[kind]
                real = targets != IGNORE_INDEX
                if guesses.shape != targets.shape:  # BERT: logits only where there is a target
                    targets = targets[real]
                same = guesses.shape == targets.shape                      # else no accuracy
                right = (guesses == targets).sum().item() if same else math.nan
                totals[kind] += np.array([loss.item(), real.sum().item(), right])
        if postprocess:
            for i, row in zip(chosen, logits.float().cpu()):
                results[i] = postprocess(examples[i], row)
    return results, totals

def decode_label(examples, logits, labels):
    """Logits (L,) -> the likeliest label."""
    p = logits[0].softmax(dim=-1).tolist()
    best = p.index(max(p))
    return {'label': labels[best], 'probability': p[best], 'probabilities': dict(zip(labels, p))}

def entities(tags):
    """
    Tags -> entities [(kind, begin, end)], end excluded. An I-kind that does not continue its kind
    begins an entity, as in CoNLL's script (Tjong Kim Sang and De Meulder 2003) and seqeval. Tags of
    other models may be kinds without a prefix, or with more prefixes (BIOES, BILOU, BMES).

    >>> entities(['B-person', 'I-person', 'O', 'I-place', 'B-place', 'noun'])
    [('person', 0, 2), ('place', 3, 4), ('place', 4, 5), ('noun', 5, 6)]
    """
    tags, found, previous, begin = [*tags, 'O'], [], '', 0
    for i, tag in enumerate(tags):
        kind = re.sub('^([BIMELSU]-|O$)', '', tag)
        if kind != previous or re.match('[BSU]-', tag) or re.match('[ELSU]-', tags[i - 1]):
            if previous:
                found.append((previous, begin, i))
            begin = i
        previous = kind
    return found

def cjk_apart(text):
    """Each CJK character becomes a word of its own."""
    return CJK.sub(r' \g<0> ', text)

def decode_tags(examples, logits, labels):
    """Logits (T, L) of each part of a text -> tags, read at a word's first token; entities."""
    tokens, tags, ends = [], [], [0]  # ends[i]: where word i - 1 ends in the text
    for example, row in zip(examples, logits):
        best, meta = row.argmax(dim=-1).tolist(), example['meta']
        tokens += meta['tokens']
        tags += [labels[best[first]] if first >= 0 else 'O' for first in meta['first']]
    text = examples[0]['meta'].get('text', ' '.join(tokens))               # as it was written
    for token in tokens:
        ends.append(text.index(token, ends[-1]) + len(token))
    found = [{'kind': kind, 'text': text[ends[i]:ends[j]].strip(), 'first': i, 'last': j - 1}
             for kind, i, j in entities(tags)]
    return {'tokens': tokens, 'tags': tags, 'entities': found}

def decode_span(examples, logits, labels):
    """
    Logits (2, T) of each window of a context -> the span with the largest P(first) P(last), at most
    30 tokens of one window (Devlin et al. 2018, arxiv.org/abs/1810.04805, sections 4.2 and 4.3; 30
    is the limit in BERT's code). A window without the answer points at [CLS]. Where labels has
    'no answer', the answer is '' if in every window [CLS] is likelier than the best span of all.
    """
    best, no_answer = {'answer': '', 'probability': 0.0}, 1.0
    for example, row in zip(examples, logits):
        p, meta = row.softmax(dim=-1), example['meta']
        no_answer = min(no_answer, float(p[:, 0].prod()))                  # both at [CLS]
        place, offsets = meta['first'], meta['offsets']                    # of the context's tokens
        if not offsets:
            continue
        first, last = p[:, place:place + len(offsets)]
        both = (first[:, None] * last).triu().tril(29)  # P(begin, end), begin <= end < begin + 30
        nonblank = torch.tensor([not meta['context'][a:b].isspace() for a, b in offsets]).int()
        until = nonblank.cumsum(0)                             # how many up to each token
        before = until - nonblank
        both = both * (until > before[:, None])                # not all blank from begin to end
        begin, end = divmod(int(both.argmax()), len(offsets))
        probability = float(both[begin, end])
        if probability > best['probability']:
            low, high = offsets[begin][0], offsets[end][1]
            text = meta['context'][low:high]
            best = {'answer': text.strip(), 'probability': probability,
                    'start': meta['start'] + low + len(text) - len(text.lstrip())}
    if labels and no_answer > best['probability']:
        return {'answer': '', 'probability': no_answer}
    return best

def decode_masks(tokenizer, suppressed, k, example, logits):
    """(T, V) -> for each [MASK] the k likeliest tokens, [(text, probability)]."""
    masked = torch.tensor(example['ids']) == tokenizer.id('[MASK]')
    logits = logits[:len(masked)][masked].masked_fill(suppressed, -math.inf)
    p, best = logits.softmax(dim=-1).topk(min(k, logits.size(-1)))
    return {'guesses': [[(tokenizer.decode([i]), value) for i, value in zip(*row) if value]
                        for row in zip(best.tolist(), p.tolist())]}

def answer_rows(model, tokenizer, rows, task, labels, settings):
    """Rows, each a list of its examples -> (an answer for each, totals of `predict`)."""
    examples = list(itertools.chain(*rows))
    if task == 'masks':  # decoded batch by batch: the logits of all would not fit into memory
        suppressed = suppressed_tokens(model, tokenizer, ends=False).cpu()
        decode = functools.partial(decode_masks, tokenizer, suppressed, settings.top_k or 5)
        return predict(model, examples, tokenizer.pad_id, decode)
    if task not in DECODERS:  # text to text
        return [{'target': texts[0].text, 'targets': [text.to_dict() for text in texts]}
                for texts in write_targets(model, tokenizer, examples, settings)], {}
    logits, totals = predict(model, examples, tokenizer.pad_id, lambda example, logits: logits)
    rest = iter(logits)
    return [DECODERS[task](row, [next(rest) for _ in row], labels) for row in rows], totals

# -----------------------------------------------------------------------------
# Scores from 0 to 1, BLEU to 100. A function of SCORES takes the answers and examples of all rows.

def f1(hits, guessed, true):
    """The harmonic mean of precision hits / guessed and recall hits / true."""
    return 2 * hits / max(1, guessed + true)

def label_scores(answers, golds):
    """Accuracy, and macro F1: the mean of the F1 of each label that occurs."""
    guesses, right = [a['label'] for a in answers], [g[0]['meta']['label'] for g in golds]
    hits = collections.Counter(a for a, b in zip(guesses, right) if a == b)
    guessed, true = collections.Counter(guesses), collections.Counter(right)
    f1s = [f1(hits[label], guessed[label], true[label]) for label in guessed | true]
    return {'accuracy': hits.total() / len(right), 'macro_f1': fmean(f1s)}

def entity_scores(answers, golds):
    """Precision, recall and F1 of whole entities: both ends and the kind must be right."""
    guesses, right = [], []  # tags of all texts in one list, an O after each text, as in seqeval
    for answer, gold in zip(answers, golds):
        guesses += [*answer['tags'], 'O']
        right += [tag if first >= 0 else 'O'  # a word without a token is O
                  for example in gold
                  for tag, first in zip(example['meta']['tags'], example['meta']['first'])] + ['O']
    hits, found, true = count_ngrams(entities(guesses), entities(right), 1)
    return {'precision': hits / max(1, found), 'recall': hits / max(1, true),
            'f1': f1(hits, found, true)}

def count_ngrams(guess, right, n):
    """Numbers of n-grams of two lists (of words, entities): in common, in guess, in right."""
    guess, right = (collections.Counter(zip(*(words[i:] for i in range(n))))
                    for words in (guess, right))
    return (guess & right).total(), guess.total(), right.total()

def answer_words(text):
    """The words that SQuAD's script compares: no case, punctuation, articles. CJK by characters."""
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return cjk_apart(re.sub(r'\b(a|an|the)\b', ' ', text)).split()

def answer_scores(answers, golds):
    """Exact match, and F1 of the words in common, each against the best of the gold answers."""
    exact, overlap = [], []
    for a, g in zip(answers, golds):
        words, rights = answer_words(a['answer']), map(answer_words, g[0]['meta']['answers'])
        rights = [*filter(None, rights)] or [[]]  # no answer: '' is right
        exact.append(words in rights)
        overlap.append(max(words == right or f1(*count_ngrams(words, right, 1))
                           for right in rights))
    return {'exact_match': fmean(exact), 'f1': fmean(overlap)}

def bleu_words(text):
    """sacrebleu's 13a rule: punctuation apart, except . and , in a number; CJK by characters."""
    text = f' {cjk_apart(text.rstrip())} '
    for pattern, apart in [('<skipped>|-\n', ''), ('&quot;', '"'), ('&amp;', '&'), ('&lt;', '<'),
                           ('&gt;', '>'), (r'([!-&(-+:-@/\[-`{-~ ])', r' \1 '),
                           (r'([\u3000-\u303f\uff00-\uffef])', r' \1 '),
                           (r'([^0-9])([.,])', r'\1 \2 '), (r'([.,])([^0-9])', r' \1 \2'),
                           (r'([0-9])(-)', r'\1 \2 ')]:
        text = re.sub(pattern, apart, text)
    return text.split()

def bleu(guesses, references):
    """
    BLEU of a corpus, 0 to 100 (Papineni et al. 2002; Post 2018, https://arxiv.org/abs/1804.08771):
    the geometric mean of the precisions of 1- to 4-grams (clipped counts), times a brevity penalty
    if the guesses are shorter. The first n without a match has 1/2 match, the next 1/4, ...
    """
    guesses, references = list(map(bleu_words, guesses)), list(map(bleu_words, references))
    mean, smooth = 1.0, 1.0
    for n in range(1, 5):
        counts = [count_ngrams(*pair, n) for pair in zip(guesses, references)]
        hits, total, _ = map(sum, zip((0, 0, 0), *counts))                 # 0: there may be no text
        if not total or (n == 1 and not hits):
            return 0.0
        smooth /= 1 if hits else 2
        mean *= ((hits or smooth) / total) ** 0.25
    brevity = min(1.0, math.exp(1 - sum(map(len, references)) / sum(map(len, guesses))))
    return 100 * brevity * mean

ROUGE_WORD = regex.compile(CJK.pattern + r'|[\p{L}\p{M}\p{N}]+')

def rouge(guess, right):
    """ROUGE-1, -2, -L (Lin 2004; there -1, -2 are recalls): F1 of words, pairs, subsequences."""
    guess, right = [ROUGE_WORD.findall(cjk_apart(text.lower())) for text in (guess, right)]
    row = [0] * (len(right) + 1)  # longest common subsequence with the first i words of `right`
    for word in guess:
        old = row[:]
        for i, other in enumerate(right, 1):
            row[i] = old[i - 1] + 1 if word == other else max(old[i], row[i - 1])
    return [f1(*count_ngrams(guess, right, 1)), f1(*count_ngrams(guess, right, 2)),
            f1(row[-1], len(guess), len(right))]

# The scores of text to text (see LOWER_IS_BETTER), and with how many digits each is printed
TARGET_SCORES = {'bleu': 2, 'rouge1': 4, 'rouge2': 4, 'rougeL': 4, 'exact_match': 4}

def target_scores(answers, golds):
    """BLEU of the corpus; ROUGE and exact match, the means over the texts."""
    guesses, references = [a['target'] for a in answers], [g[0]['meta']['target'] for g in golds]
    rouges = map(fmean, zip(*map(rouge, guesses, references)))             # rouge1, rouge2, rougeL
    parts = lambda text: [*filter(None, map(str.strip, split_cjk(text)))]  # BERT writes 你 好
    same = [parts(guess) == parts(right) for guess, right in zip(guesses, references)]
    return dict(zip(TARGET_SCORES, [bleu(guesses, references), *rouges, fmean(same)], strict=True))

DECODERS = {'classify': decode_label, 'tag': decode_tags, 'qa': decode_span}
SCORES = {'classify': label_scores, 'tag': entity_scores, 'qa': answer_scores,
          'seq2seq': target_scores}
BEST_SCORES = {  # scores that may choose best.pt: the first one, unless --best_by names another
    'classify': ['accuracy', 'macro_f1'], 'tag': ['f1'], 'qa': ['f1', 'exact_match'],
    'seq2seq': ['loss', *TARGET_SCORES]}
LOWER_IS_BETTER = ['loss']  # of all other scores, higher is better

def task_scores(model, tokenizer, examples, task, labels, settings=None):
    """Scores and loss of labelled examples (text to text: no loss). Default: greedy decoding."""
    settings = settings or Settings(temperature=0.0)
    rows = [list(row) for _, row in itertools.groupby(examples, lambda e: e['meta']['row'])]
    answers, totals = answer_rows(model, tokenizer, rows, task, labels, settings)
    scores = SCORES[task](answers, rows)
    for nats, n, *_ in totals.values():
        scores = {'loss': nats / max(1, n)} | scores
    return scores

def text_scores(nats, predictions, counts):
    """
    Loss (nats per token), perplexity = exp(loss), bits per byte to compare across tokenizers.
    counts: those of the text, as in meta.json.
    """
    loss = nats / predictions
    return {'loss': loss, 'perplexity': math.exp(min(loss, 700)),
            'bits_per_byte': nats / math.log(2) / counts['bytes']}

def masked_accuracy(model, tokenizer, ids):
    """
    The share of ids (n,) that BERT guesses, each hidden alone; at most 1024, one drawn in each of
    so many equal parts of the text: a fixed step might meet the same place in all windows.
    """
    room, examples, k = model.config.block_size - 2, [], min(1024, len(ids))
    draws = np.random.default_rng(0).random(k)
    for i in ((np.arange(k) + draws) * len(ids) / k).astype(int):
        shown, segments = add_special_tokens(tokenizer, ids[i // room * room:][:room].tolist())
        place, targets = i % room + 1, [IGNORE_INDEX] * len(shown)
        targets[place], shown[place] = shown[place], tokenizer.id('[MASK]')
        examples.append({'ids': shown, 'segments': segments, 'targets': targets})
    _, n, right, *_ = predict(model, examples, tokenizer.pad_id)[1]['targets']
    return {'masked_accuracy': right / n}

def format_scores(scores):
    """loss 1.8980, perplexity 6.67, bits per byte 2.738"""
    digits = {'perplexity': 2, 'bits_per_byte': 3} | TARGET_SCORES
    return ', '.join(f"{name.replace('_', ' ')} {value:.{digits.get(name, 4)}f}"
                     for name, value in scores.items())

def score_text(model, tokenizer, path, kind):
    """Scores on a text, read as prepare_data.py reads it."""
    with tempfile.TemporaryDirectory() as folder:
        counts = write_ids(f'{folder}/ids', 'int64', tokenizer, read_pieces([path]))
        ids = np.fromfile(f'{folder}/ids', 'int64')
    require(len(ids) > 1, f"--score {path}: no text in it")
    if kind == 'masks':
        return masked_accuracy(model, tokenizer, tokenizer.text_of(ids))
    # Windows that do not overlap: every token but the first is predicted once.
    T, inputs, targets = model.config.block_size, ids[:-1], ids[1:]
    windows = [{'ids': inputs[i:i + T], 'targets': targets[i:i + T]}
               for i in range(0, len(inputs), T)]
    nats, n, _ = predict(model, windows, tokenizer.pad_id)[1]['targets']
    return text_scores(nats, n, counts)

def score_rows(model, tokenizer, path, task, labels, settings, block_size, ours=False):
    """Scores on rows, read as prepare_data.py reads them. ours: train.py made the model."""
    rows = [*TASKS[task].read(path)]
    require(rows, f"--score {path}: no rows in it")
    if task == 'qa' and not ours:  # other models do not say if they were trained with 'no answer'
        labels = [label for row in rows for label in TASKS[task].labels_of(row)]
    # Encoded without answers: qa_examples might cut a token at their ends. So there is no loss.
    examples = encode_rows(tokenizer, task, [row | {'answers': []} for row in rows], labels,
                           block_size)
    for example in examples:
        del example['targets']
        right = rows[example['meta']['row']].get('answers', [])
        example['meta']['answers'] = [text for _, text in right]
    return task_scores(model, tokenizer, examples, task, labels, settings)

# -----------------------------------------------------------------------------
# Attention

def attention_maps(model, batch):
    """
    A batch -> the attention weights, {'encoder' | 'decoder' | 'cross': (layers, B, H, T, S)}.
    Raises ValueError where the model has no attention.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, Attention)}
    require(layers, "an LSTM has no attention to show")
    maps = collections.defaultdict(list)
    try:
        for path, layer in layers.items():
            kind = 'encoder' if 'encoder.' in path else 'decoder'
            layer.recorded = maps['cross' if path.endswith('cross') else kind]
        with evaluating(model):
            model(**batch)
    finally:
        for layer in layers.values():
            layer.recorded = None
    return {kind: torch.stack(weights).float().cpu() for kind, weights in maps.items()}

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Attention weights</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark } /* Canvas is then white or black, and text the other */
body { max-width: 80rem; margin: auto; padding: 1rem; font: 1rem/1.4 system-ui, sans-serif }
label { margin-right: 1rem } button, select { font: inherit }
output { display: block; min-height: 2.8em; margin: 1rem 0 .5rem; overflow-wrap: anywhere }
section { max-height: max(18rem, 100dvh - 15rem); overflow: auto; scroll-padding-top: 9rem }
table { --cell: clamp(1.2rem, (min(100vw, 80rem) - 11rem) / var(--n) - 2px, 3rem);
        border-spacing: 2px; font-size: min(.9rem, var(--cell) * .7); line-height: 1.2 }
th { padding: 0; vertical-align: bottom } th:first-child { left: 0; z-index: 1 }
thead, th:first-child { position: sticky; background: Canvas } thead { top: 0; z-index: 2 }
td { min-width: var(--cell); height: var(--cell); padding: 0; text-align: center;
     font-size: clamp(0px, (var(--cell) - 1.5rem) * 99, .66rem) } /* none where it has no room */
button, bdi { overflow: hidden; text-overflow: ellipsis; white-space: pre }
bdi { display: block; margin: .4em auto; max-height: 8rem; writing-mode: vertical-rl }
button { width: 7rem; height: var(--cell); border: 0; background: none; text-align: right }
tbody tr:is(:hover, [aria-current=true]) { outline: 2px solid }
</style>
<h1>Attention weights</h1>
<label>Attention <select id="kind"></select></label>
<label>Layer <select id="layer"></select></label> <label>Head <select id="head"></select></label>
<output id="said"></output>
<section><table id="map"><thead><tr id="cols" data-said="Point at a row. A click or Tab keeps it.">
</thead><tbody id="rows"></table></section>
<script>
const maps = DATA, $ = id => document.getElementById(id)
const add = (parent, tag) => parent.appendChild(document.createElement(tag))
const fill = (select, names) => select.replaceChildren(...names.map((name, i) =>
  new Option(name, i, false, i === select.selectedIndex)))  // the same place stays chosen
const isolate = text => `\u2068${text}\u2069`  // Arabic does not turn what is around it
let kept = 0  // row 0, the headings, stands for none

function draw() {
  const {rows, cols, weights} = maps[$('kind').value], heads = weights[$('layer').value || 0]
  fill($('layer'), weights.map((_, i) => i + 1))
  fill($('head'), ['mean of all', ...heads.map((_, i) => i + 1)])
  const head = $('head').value - 1, chosen = head < 0 ? heads : [heads[head]]
  const mean = rows.map((_, i) => cols.map((_, j) =>
    chosen.reduce((sum, weights) => sum + weights[i][j], 0) / chosen.length / 1000))
  const most = Math.max(...mean.map(row => Math.max(...row)))  // has the strongest colour
  $('map').style.setProperty('--n', cols.length)
  for (const id of ['rows', 'cols']) $(id).replaceChildren()
  for (const text of ['', ...cols]) add(add($('cols'), 'th'), 'bdi').textContent = text
  mean.forEach((row, i) => {
    const tr = add($('rows'), 'tr'), digits = cols.length > 40 ? 3 : 2
    Object.assign(add(add(tr, 'th'), 'button'), {textContent: rows[i], dir: 'auto'})
    for (const w of row) {
      const td = add(tr, 'td')
      td.style.background = `rgb(59 130 246 / ${Math.sqrt(w / most)})`
      if (w && digits === 2) td.textContent = w.toFixed(2)
    }
    const best = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 5).filter(j => row[j])
    tr.dataset.said = `${isolate(rows[i])} attends to: ` +
      best.map(j => `${isolate(cols[j])} ${row[j].toFixed(digits)}`).join(', ')
  })
  point({target: document.body})
}

function point({type, target}) {  // the row below the pointer, or the last that had a click or Tab
  const at = target.closest('tr')?.rowIndex || 0, table = $('map')
  if (at && type !== 'pointerover') kept = at
  for (const row of table.rows) row.ariaCurrent = row.rowIndex === kept
  $('said').textContent = (table.rows[at || kept] || table.rows[0]).dataset.said
}
fill($('kind'), maps.map(map => map.name))
onchange = draw
for (const type of ['pointerover', 'focusin', 'click']) addEventListener(type, point)
draw()
</script>
"""

# -----------------------------------------------------------------------------
# Faster decoding: a step as a CUDA graph; weights as products with one token read them best

capture_stream = functools.cache(torch.cuda.Stream)  # shared: each stream has memory of its own

def capture(step, cache, new, uniforms):
    """
    Record step() as a CUDA graph, which launches hundreds of small kernels at once: Python takes
    longer to launch them than they take to run. A graph reads and writes fixed places in memory.
    So cache.length becomes a tensor, to which each launch adds 1, and all else that a step changes
    must be a tensor changed in place. Returns replay(new, i, more): the newest token of each row,
    [[token], ...] -> the next ones, chosen by uniforms[i]; with `more` the GPU begins step i + 1
    while Python reads them. Capturing costs the time of one more step.
    """
    ids, uniform = torch.tensor(new, device=uniforms.device), uniforms[0].clone()
    length, stream, graph = ids.new_tensor(cache.length), capture_stream(), torch.cuda.CUDAGraph()
    cache.length = length  # until now an int: a prompt needs no mask
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(ids, uniform)  # libraries set themselves up in the first call
        length.sub_(1)  # undo this step: the next one overwrites its keys
    with torch.cuda.graph(graph, stream=stream):  # waits for all streams; records, runs nothing
        chosen = step(ids, uniform)
    launched = False  # True: the graph already computes the next tokens

    def launch(new, i):
        ids.copy_(new)
        uniform.copy_(uniforms[i])
        graph.replay()  # fills chosen

    def replay(new, i, more):
        nonlocal launched
        if cache.length is not length:
            cache.length = length.fill_(cache.length)
        if not launched:
            launch(torch.tensor(new), i)
        tokens = chosen.to('cpu', non_blocking=True)
        copied = torch.cuda.current_stream().record_event()
        if more:
            launch(chosen[:, None].clamp(min=0), i + 1)                    # -1 is no row
        launched = more
        copied.synchronize()
        return tokens.tolist()

    return replay

def by_columns(t):
    """On a CPU: a float32 matrix by columns, which a product with one token reads 1/4 faster."""
    gains = t.is_cpu and t.dtype == torch.float32 and t.ndim == 2
    return t.t().contiguous().t() if gains else t

def join_projections(attention):
    """q, k, v of self-attention in one product: starting three takes longer than multiplying."""
    layers = [attention.q, attention.k, attention.v]
    if {*map(type, layers)} != {torch.nn.Linear}:
        return                                                             # such as LoRA
    weight = by_columns(torch.cat([layer.weight for layer in layers]))
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    sizes = [layer.out_features for layer in layers]
    for layer, rows in zip(layers, weight.split(sizes)):
        layer.weight.data = rows                                           # no memory of its own
    joined = lambda x, source: torch.nn.functional.linear(x, weight, bias).split(sizes, dim=-1)
    x = weight[None, :1]  # any input, (1, 1, C), shows whether you have changed `project`
    old, new = (torch.cat(project(x, x), dim=-1) for project in (attention.project, joined))
    if (new - old).norm() <= torch.finfo(new.dtype).eps ** 0.75 * old.norm():
        attention.project = joined

@torch.no_grad()
def arrange_weights(model):
    """Products with one token, faster. Afterwards do not train, move, convert or hook the model."""
    for p in model.parameters():
        p.data = by_columns(p.data)
    for name, m in model.named_modules():
        if isinstance(m, Attention) and not name.endswith('cross'):
            join_projections(m)
    return model

# -----------------------------------------------------------------------------
# The script

@dataclass
class Settings:
    """The flags of this script."""
    start: str = flag('', 'the input: a text, FILE:path, or - for standard input')
    out_dir: str = flag('out', 'the folder that train.py wrote')
    init_from: str = flag('', 'instead: a checkpoint, a Hugging Face folder, or a name on the hub')
    num_samples: int = flag(1, 'number of texts to write; with beams, the best ones', low=1)
    max_new_tokens: int = flag(None, 'a text has at most this many tokens [200; with --score, as '
                                     'many as the longest target]', low=1)
    temperature: float = flag(0.8, '0: take the likeliest token; 1: draw by the probabilities of '
                                   'the model; for text to text 0 if not given', high=1e6)
    num_beams: int = flag(1, 'above 1: beam search with this many beams', low=1, high=4096)
    length_penalty: float = flag(1.0, 'beam search divides log P by length^length_penalty', high=10)
    top_k: int = flag(0, 'draw from the k likeliest tokens; 0: all. For [MASK]: show k; 0: 5')
    top_p: float = flag(1.0, 'draw from the fewest tokens that reach this probability', high=1)
    stop: list = flag([], "texts at which to stop; a line end is $'\\n' in most shells")
    seed: int = flag(-1, 'the same seed writes the same text; -1: a new one every time', low=-1)
    stream: bool = flag(False, 'print text as it is generated, one sample after the other')
    score: str = flag('', 'a file to score: a text, or labelled rows as prepare_data.py reads them')
    json: bool = flag(False, 'print JSON objects, one a line')
    export: str = flag('', 'write the model as a Hugging Face folder')
    attention: str = flag('', 'write an HTML page that shows the attention weights for --start')
    device: str = flag('auto', 'auto: cuda, else cpu', ('auto', 'cpu', 'cuda', 'mps'))
    dtype: str = flag('auto', 'of the weights; auto: bfloat16 to write on a GPU, else float32',
                      ('auto', 'float32', 'bfloat16', 'float16'))

    def __post_init__(self):
        if self.seed == -1:
            self.seed = int.from_bytes(os.urandom(4))

def lacking(checkpoint, kind):
    """Names of weights that a model of this kind needs and its folder lacks, so they are random."""
    needed = {'masks': 'output|transform', 'masks and pairs': 'output|transform|pooler|nsp_head',
              'classify': r'trunk\.pooler'}.get(kind, '$^')
    return [name for name in checkpoint.get('new', []) if re.match(needed, name)]

def check_use(given, settings, kind, arch):
    """Returns 'export', 'attention', 'score' or 'start'. ValueError for a flag without effect."""
    use = next(filter(given.get, ('export', 'attention', 'score')), 'start')
    beams, n = settings.num_beams, settings.num_samples
    writing = 'max_new_tokens stop num_beams '  # flags that are read where text is generated
    if beams > 1:
        writing += 'length_penalty num_samples'
    elif settings.temperature > 0:
        writing += SAMPLING + ' num_samples'
    else:
        writing += 'temperature'
    live = '' if beams > 1 or settings.json else ' stream'
    read = {'export': '', 'attention': 'start '}.get(use, 'json ')  # flags of this use and kind
    read += {'start text': writing + live, 'start seq2seq': writing, 'start masks': 'top_k',
             'score seq2seq': writing.replace('num_samples', ''),
             'attention seq2seq': 'max_new_tokens' * (arch == 'encdec')}.get(f'{use} {kind}', '')
    unread = given.keys() - {use, *read.split(), 'init_from' if settings.init_from else 'out_dir',
                             'device', 'dtype'}
    if unread:
        raise ValueError(
            f"--{min(unread)} changes nothing here (--{use}, a {kind} model, --num_beams {beams} "
            f"--temperature {settings.temperature}): leave it out, or change one of these")
    require('' not in settings.stop, "--stop '': an empty text stands everywhere: leave it out")
    require(beams == 1 or n <= beams, f"--num_samples {n}: a search with --num_beams {beams} finds "
            "no more texts than beams: raise it")
    return use

def open_model(path, device='cpu'):
    """As `load` of model.py, and a third value: the tokenizer, or None where there is none."""
    (model, checkpoint), tokenizer = load(path, device), None
    if checkpoint.get('tokenizer'):
        tokenizer = Tokenizer.from_dict(checkpoint['tokenizer'])
    elif 'folder' in checkpoint:  # a Hugging Face model
        with contextlib.suppress(FileNotFoundError):
            tokenizer = load_tokenizer(checkpoint['folder'])
            checkpoint['tokenizer'] = tokenizer.to_dict()
            about = read_any(checkpoint['folder'], 'tokenizer_config.json')
            length = about.get('model_max_length')                         # as an export says it
            if isinstance(length, int) and length > 3:  # else it is no limit
                checkpoint['block_size'] = length
    if checkpoint.get('not_read'):
        to_stderr(f"{path}: not read: {', '.join(checkpoint['not_read'])}")
    return model, checkpoint, tokenizer

def export(model, tokenizer, labels, folder, kind='text', block_size=None):
    """Write model and tokenizer as a Hugging Face folder, without rows that were added to GPT-2."""
    config, ends = model.config, tokenizer.end_ids
    kind = config.task or kind
    size = min(config.vocab_size, max(tokenizer.n_vocab, 1 + max(ends)))
    if (tokenizer.name, config.arch, kind) == ('gpt2', 'gpt', 'text'):
        size = min(size, tokenizer.pad_id)  # the first token added; text to text needs its [SEP]
    files = tokenizer.export_files(size, config.arch, kind)
    files['tokenizer_config.json']['model_max_length'] = block_size or config.block_size
    first = 'decoder_start_token_id' if config.arch == 'encdec' else 'bos_token_id'
    fields = {'eos_token_id': ends if len(ends) > 1 else ends[0], first: tokenizer.start_id}
    if tokenizer.pad_id < size:
        fields['pad_token_id'] = tokenizer.pad_id
    if kind in ('text', 'seq2seq'):  # else transformers writes 20 tokens, or past the end
        files['generation_config.json'] = fields | {'max_new_tokens': config.block_size // 2}
    if config.task == 'qa':
        fields['task_specific_params'] = {'labels': labels}
    elif labels:
        fields['id2label'] = dict(enumerate(labels))
        fields['label2id'] = {label: i for i, label in enumerate(labels)}
    require(not any(Path(folder).glob('*')), f"{folder} is not empty: choose another name")
    with new_folder(folder) as temporary:
        export_huggingface(model, temporary, size, **fields)
        for name, data in files.items():
            write_json(temporary / name, data)

def find_device(name):
    """auto -> cuda, else cpu. Raises ValueError where the machine lacks the one named."""
    # mps not by itself: torch up to 2.13 multiplies wrongly on some chips (pytorch#193487)
    backends = {'cuda': torch.cuda, 'cpu': torch.cpu, 'mps': torch.backends.mps}
    for device, backend in backends.items():
        if name in ('auto', device) and backend.is_available():
            return device
    raise ValueError(f"--device {name}: this machine or this torch has none: use --device auto")

def read_start(start):
    """The text that --start names."""
    try:
        if start == '-':
            require(sys.stdin, "--start -: standard input is closed: give a text")
            sys.stdin.reconfigure(encoding='utf-8-sig', newline=None)  # as a file
            return sys.stdin.read()
        if start.startswith('FILE:'):
            return Path(start.removeprefix('FILE:')).read_text(encoding='utf-8-sig')
        start.encode()
    except UnicodeError as e:
        raise ValueError(f"--start {start!r} is not UTF-8 at byte {e.start}: convert it") from None
    return start

# Tokens as in corpora: U.S.; a word without 's and without punctuation at its end; the 's itself;
# ... and --; any other sign, such as an emoji of several characters
TOKEN = regex.compile(r"(?:\p{L}\.){2,}(?![-\w])|['’]s\b|[\p{L}\p{N}_@#]"
                      rf"(?:(?!['’]s\b|\.\.|--)[^\s()\[\]{{}}—…{WIDE}])*"
                      r"(?<=[\p{L}\p{N}_]\p{M}*)"
                      r"|\.{2,}|-{2,}|(?!\s)\X")

def examples_of(tokenizer, kind, line, block_size):
    """--start, or a line of it -> the examples for the model. kind: 'text', 'masks' or a task."""
    if kind == 'text':
        ids = tokenizer.encode(line).tolist()
        if '<|start|>' in tokenizer.special or not ids:  # an empty text begins a document
            ids.insert(0, tokenizer.start_id)
        return [{'ids': ids[-block_size:]}]
    if DECODERS.get(kind) == decode_tags:
        tokens = filter(None, map(str.strip, TOKEN.findall(cjk_apart(line))))
        row = {'tokens': [*tokens], 'text': line}
    elif kind == 'seq2seq':
        row = {'source': line}
    else:
        names = ('question', 'context') if kind == 'qa' else ('text', 'text_b')
        texts = [text.strip() for text in line.split('|||')]
        least = 2 if kind == 'qa' else 1
        require(least <= len(texts) <= 2 and all(texts),
                f"{line[:60]!r}: write {' ||| '.join(names)}")
        if kind == 'masks':
            return [masked_example(tokenizer, texts, block_size)]
        row = dict(zip(names, texts))
    return encode_rows(tokenizer, kind, [row], [], block_size)

def masked_example(tokenizer, texts, block_size):
    """
    One or two texts with [MASK] -> an example. Where tokens carry the space before a word, the
    space before [MASK] is part of the hidden word.
    """
    parts, hidden = [], r' ?\[MASK\]' if tokenizer.mask_takes_space else r'\[MASK\]'
    for text in texts:
        ids = []
        for piece in re.split(hidden, text):
            ids += [tokenizer.id('[MASK]'), *tokenizer.encode(piece).tolist()]
        parts.append(ids[1:])
    ids, segments = add_special_tokens(tokenizer, *parts)
    require(len(ids) <= block_size, f"{texts[0][:60]!r} has {len(ids)} tokens, more than "
            f"block_size={block_size}: shorten it")
    return {'ids': ids, 'segments': segments}

def format_answer(answer):
    """An answer as one line of text."""
    one_line = lambda text: ' '.join(text.splitlines()).strip()
    if 'guesses' in answer:
        lists = [[f'{one_line(text) or repr(text)} {p:.3f}' for text, p in guesses]
                 for guesses in answer['guesses']]
        return ' | '.join(map(', '.join, lists))
    if 'probabilities' in answer:
        return f"{answer['label']} {answer['probability']:.4f}"
    if 'tags' in answer:
        tagged = ' '.join(map('/'.join, zip(answer['tokens'], answer['tags'])))
        found = '; '.join(f"{e['kind']}: {one_line(e['text'])}" for e in answer['entities'])
        return f'{tagged}\t{found}'.rstrip()
    if 'targets' in answer:
        return '\n'.join(one_line(target['text']) for target in answer['targets'])
    return one_line(str(next(iter(answer.values()))))                      # qa, and your own tasks

def write_attention(model, tokenizer, prompt, kind, settings, block_size):
    """The page that --attention names. An encoder-decoder shows the target that it writes, too."""
    require(kind == 'text' or '\n' not in prompt.strip(), "--attention shows one line: give one")
    example, whole = (examples_of(tokenizer, kind, prompt, n)[0] for n in (block_size, 10 ** 9))
    if model.config.arch == 'encdec':
        [[text]] = write_targets(model, tokenizer, [example], settings)
        example['decoder_ids'] = [tokenizer.start_id, *text.ids]
    elif kind == 'seq2seq':
        example['ids'][-1] = tokenizer.id('[SEP]')
    maps = attention_maps(model, collate([example], tokenizer.pad_id, device_of(model)))
    check_finite(*maps.values())
    source = [render_token(tokenizer, i) for i in example['ids']]
    target = [render_token(tokenizer, i) for i in example.get('decoder_ids', example['ids'])]
    data = [{'name': name, 'rows': source if name == 'encoder' else target,
             'cols': target if name == 'decoder' else source,
             'weights': (1000 * weights[:, 0]).round().int().tolist()}  # (layers, H, T, S)
            for name, weights in maps.items()]
    page = PAGE.replace('DATA', json.dumps(data).replace('<', r'\u003c')).encode()
    write_file(settings.attention, lambda f: f.write(page))
    to_stderr(f"{settings.attention}: the weights of {len(source)} tokens"
              + ", a part" * (len(source) < len(whole['ids'])))

def print_texts(model, tokenizer, prompt, settings):
    """Print the samples. Returns the number of their tokens."""
    texts, threads = [], torch.get_num_threads()
    ids = examples_of(tokenizer, 'text', prompt, model.config.block_size)[0]['ids']
    live, n = settings.stream, 1 if settings.num_beams > 1 else settings.num_samples
    if n * num_parameters(model) < 20e6:
        torch.set_num_threads(1)  # the products are so small that threads mostly wait for others
    try:
        for rows in [[row] for row in range(n)] if live else [range(n)]:  # live: one by one
            if live:
                print('\n---\n' * bool(texts) + prompt, end='', flush=True)
            written = write_batch(model, tokenizer, [ids] * len(rows), [], rows, settings)
            texts += itertools.chain(*written)
    finally:  # after Ctrl-C, too: a notebook goes on
        torch.set_num_threads(threads)
    if settings.json:
        for text in texts:
            print(json.dumps({'prompt': prompt} | text.to_dict(), ensure_ascii=False))
    else:
        print('' if live else '\n---\n'.join(prompt + text.text for text in texts))
    return sum(len(text.ids) for text in texts)

def print_answers(model, tokenizer, prompt, kind, labels, settings, block_size):
    """Answer a line with a line; an empty line stays empty. Returns the number of answers."""
    rows = []
    lines = [line.strip() for line in prompt.removesuffix('\n').split('\n')]
    for n, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            require(kind != 'masks' or '[MASK]' in line,
                    f"{line[:60]!r} has no [MASK]: write one for a word to predict")
            is_row = re.match(r'\{"(text|label|source)"|.*\t', line)
            require(kind not in ('classify', 'seq2seq') or not is_row,
                    f"{line[:60]!r} has a tab or keys: give the text alone, and rows to --score")
            rows.append(examples_of(tokenizer, kind, line, block_size))
        except ValueError as e:
            raise ValueError(f"line {n}: {e}") from None
    # A thousand at a time: whatever ends the program, the answers before are printed.
    answers = (answer for i in range(0, len(rows), 1000) for answer in answer_rows(
        model, tokenizer, rows[i:i + 1000], kind, labels,
        replace(settings, seed=settings.seed + i))[0])                     # not the draws of before
    for line in lines:
        if not line:
            print()
        elif settings.json:
            print(json.dumps({'text': line} | next(answers), ensure_ascii=False))
        else:
            print(format_answer(next(answers)))
    return len(rows)

def main(argv):
    given = read_flags(argv, __doc__, {'flags': Settings})
    settings = Settings(**given)
    check_flags(settings)
    device, path = find_device(settings.device), settings.init_from or settings.out_dir
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans 30 ms for each new shape
    if not settings.init_from and not os.path.exists(path):  # do not seek it on the hub
        raise FileNotFoundError(f"there is no folder {path}: train a model first (python train.py)")
    model, checkpoint, tokenizer = open_model(path, device)
    require(tokenizer, f"{path} has no tokenizer: it cannot read or write text")
    labels, arch = checkpoint.get('labels', []), model.config.arch
    kind = checkpoint.get('task') or {'bert': 'masks', 'encdec': 'seq2seq'}.get(arch, 'text')
    if kind != 'text':
        settings.temperature = given.get('temperature', 0.0)
    use = check_use(given, settings, kind, arch)
    if use != 'export' and (arch, model.config.positions) == ('encdec', 'relative'):
        model.config.block_size = 10 ** 9  # relative positions have no limit
    block_size = model.config.block_size
    if kind in DECODERS:  # long texts are cut as those of the training data were
        block_size = min(block_size, checkpoint.get('block_size') or block_size)
    writes = use == 'start' and kind in ('text', 'seq2seq')
    dtype = settings.dtype
    if dtype == 'auto':
        half = device == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = 'bfloat16' if half and writes and arch != 'lstm' else 'float32'
    model.to(getattr(torch, dtype))
    if writes:
        arrange_weights(model)
    prompt = read_start(settings.start)
    require(use in ('export', 'score') or kind == 'text' or prompt.strip(),
            "--start is empty: give a text, FILE:path, or - for standard input")
    require(use == 'attention' or not lacking(checkpoint, kind),
            f"{path} is an encoder without a head, so it has no output: fine-tune it first, with "
            f"python train.py --init_from {path}")
    special = {tokenizer.decode([i]) for i in tokenizer.special.values()}
    typed = special.intersection(re.findall(r'<[^<>\s]+>|\[\w+\]', prompt))
    if kind != 'masks' and typed:
        to_stderr(f"--start: {', '.join(sorted(typed))}: no special token, but text here")
    if use == 'attention':
        write_attention(model, tokenizer, prompt, kind, settings, block_size)
    elif use == 'export':
        check_finite(*model.parameters())
        export(model, tokenizer, labels, settings.export, kind, block_size)
        print(f"{settings.export}: a model and its tokenizer, as transformers loads them")
    elif use == 'score':
        scores = (score_rows(model, tokenizer, settings.score, kind, labels, settings, block_size,
                             'folder' not in checkpoint)
                  if kind in TASKS else score_text(model, tokenizer, settings.score, kind))
        print(json.dumps(scores) if settings.json else format_scores(scores))
    else:
        started = time.perf_counter()
        if kind == 'text':
            n, what, rate = print_texts(model, tokenizer, prompt, settings), 'tokens', 'tok/s'
        else:
            n = print_answers(model, tokenizer, prompt, kind, labels, settings, block_size)
            what, rate = 'answers', 'a second'
        seconds = time.perf_counter() - started
        to_stderr(f"{n} {what} in {seconds:.2f} s ({n / seconds:.1f} {rate})")

if __name__ == '__main__':
    run(main)
