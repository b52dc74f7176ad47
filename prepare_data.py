"""
From text to numbers. A data set becomes a folder of plain files, which train.py reads:

    data/NAME/meta.json             what it is: task, vocabulary, counts, labels, source, sha256
    data/NAME/tokenizer.json        how text becomes ids and back
    data/NAME/train.bin, val.bin    to pre-train on: one long row of ids (uint16 or uint32);
                                    <|endoftext|> follows each document that is complete
    data/NAME/train.jsonl, val.jsonl    to fine-tune on: one example a line, whose keys are the
                                    arguments of model.forward(), and `meta`

    python prepare_data.py --dataset pydoc                       Python's documentation, offline
    python prepare_data.py --input book.txt notes/               text files, folders, JSON lines
    python prepare_data.py --task classify --input reviews.tsv   label<TAB>text[<TAB>second text]
    python prepare_data.py --task tag --input entities.conll     a token and its tag a line
    python prepare_data.py --task qa --input squad.json          questions, answered in a context
    python prepare_data.py --task seq2seq --input en-de.tsv      source<TAB>target
    python prepare_data.py --show "The import statement"         how a text becomes tokens

After small helpers comes the theory: byte-pair encoding, tokenizers, and how labelled texts become
examples. Then come files, tasks, built-in data sets, the tokenizers of other models, flags, errors
in one line, and the script. What train.py and sample.py share with it, they import from here.

    [1] Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword Units,
        https://arxiv.org/abs/1508.07909
    [2] Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2)
    [3] Devlin et al. 2018, BERT, https://arxiv.org/abs/1810.04805
    [4] Rajpurkar et al. 2016, SQuAD, https://arxiv.org/abs/1606.05250
"""

import argparse
import ast
import base64
import bisect
import collections
import contextlib
import dataclasses
import difflib
import gc
import gzip
import hashlib
import heapq
import importlib
import io
import itertools
import json
import keyword
import math
import operator
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import tokenize
import tomllib  # Python 3.11 or newer
import unicodedata
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import tiktoken

# -----------------------------------------------------------------------------
# Small helpers

def require(holds, message):
    """Raise ValueError unless `holds`. (model.py, which imports torch, has its own.)"""
    if not holds:
        raise ValueError(message)

def to_stderr(text):
    """Print a line on standard error, apart from the results on standard output."""
    if sys.stderr:  # it may be closed
        print(text, file=sys.stderr, flush=True)

def progress(text):
    """Write text over the last progress line, on a terminal, by one process only. '' clears it."""
    with contextlib.suppress(OSError, AttributeError):  # it may be closed, or a class of yours
        if sys.stderr.isatty() and os.environ.get('RANK', '0') == '0':
            width = shutil.get_terminal_size().columns - 1
            print(text[:width].ljust(width), end='\r', file=sys.stderr, flush=True)

def pick(row, *names):
    """The part of a dict with these keys, as far as it has them."""
    return {name: row[name] for name in names if name in row}

def some_of(names):
    return ', '.join(map(str, names[:10])) + ', ...' * (len(names) > 10)

def optional(package):
    """A package that only some folders need."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError("one more package is needed: pip install "
                         + package.removeprefix('google.')) from None

# -----------------------------------------------------------------------------
# Byte-pair encoding: how a tokenizer is learned from text

# GPT-2's pattern [2]: 's and the like; letters, digits or signs, with a space before; white space.
# Marks stay with their letter: GPT-2's own \p{L}+ cuts a word of Hindi at each vowel sign.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}[\p{L}\p{M}]*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

def merge(tokens, pair, new):
    """
    Put the token `new` in place of each pair, from left to right.

    >>> merge([1, 2, 3, 1, 2], (1, 2), 4)
    [4, 3, 4]
    >>> merge([1, 1, 1], (1, 1), 2)
    [2, 1]
    """
    merged = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged

def train_bpe(piece_counts, n_tokens):
    """
    Byte-pair encoding [1] over bytes [2]: start from the 256 bytes, and again and again merge the
    pair of neighbours that occurs most often; of equally frequent pairs, the one whose bytes sort
    first. {piece: how often it occurs} -> {bytes: id} of n_tokens tokens, or fewer if no pair is
    left that occurs twice. A piece is a match of WORDS, or a part of one; no token crosses its end.

    To count all pairs again before each merge would be right, but slow. Here each distinct piece is
    stored once, as a list of tokens, and a merge changes only pieces that hold the pair: of the
    part around its places, the old pairs are subtracted from the counts, and the new ones added.
    """
    tokens = [bytes([b]) for b in range(256)]
    pieces = [[tokens[b] for b in piece.encode()] for piece in piece_counts]
    weights = [*piece_counts.values()]      # how often each piece occurs
    counts = collections.defaultdict(int)   # pair -> how often it occurs
    holders = collections.defaultdict(set)  # pair -> the numbers of the pieces that hold it
    for i, piece in enumerate(pieces):
        for pair in itertools.pairwise(piece):
            counts[pair] += weights[i]
            holders[pair].add(i)

    # The least entry of a heap is on top: with minus the count, the most frequent pair. If a
    # count has become smaller since its pair was pushed, the pair is pushed again.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while len(tokens) < n_tokens and heap and heap[0][0] < -1:
        count, pair = heapq.heappop(heap)
        changed = {pair}
        if counts[pair] == -count:  # up to date: the most frequent pair
            new = b''.join(pair)
            tokens.append(new)
            for i in holders.pop(pair):
                piece = pieces[i]
                places = [at for at, p in enumerate(itertools.pairwise(piece)) if p == pair]
                if not places:  # earlier merges have taken its tokens
                    continue
                here = slice(max(0, places[0] - 1), places[-1] + 3)      # and a token on each side
                merged = merge(piece[here], pair, new)
                for p in itertools.pairwise(piece[here]):
                    counts[p] -= weights[i]
                piece[here] = merged
                for p in itertools.pairwise(merged):
                    counts[p] += weights[i]
                    if new in p:
                        changed.add(p)
                        holders[p].add(i)
        for p in changed:
            heapq.heappush(heap, (-counts[p], p))
        progress(f"learning tokens: {len(tokens):,} of {n_tokens:,}")
    progress('')
    return {token: i for i, token in enumerate(tokens)}

# -----------------------------------------------------------------------------
# Tokenizers: how text becomes ids and back

# the end of a document, four of BERT's, and T5's sentinels (see span_corruption in train.py)
SPECIALS = ['<|endoftext|>', '[PAD]', '[CLS]', '[SEP]', '[MASK]',
            *(f'<extra_{i}>' for i in range(100))]

EACH = r'(?s:.)'  # each character is a piece
FORMAT = 'plainformer tokenizer 2'

class Tokenizer:
    """
    A pattern cuts text into pieces, and ranks, a table {bytes: id}, says which bytes of a piece are
    one token. char, byte, bpe and gpt2 differ in pattern and table. bpe and gpt2 start from the
    bytes of a piece and merge, again and again, the pair of neighbours that was learned first,
    whose token has the smallest id: explain() shows each step. Special tokens, such as
    <|endoftext|> and [MASK], have ids of their own: where a text says [MASK], it is text, unless
    sample.py asks a BERT.
    """
    unknown = None  # the id of the unknown token: there is none (char raises ValueError)

    def __init__(self, name, pattern, ranks, special=()):
        """special {text: id}; those of SPECIALS that it lacks get the ids after all others."""
        self.name, self.pattern, self.ranks, self.special = name, pattern, ranks, dict(special)
        for text in SPECIALS:
            self.special.setdefault(text, len(ranks) + len(self.special))
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=self.special)
        self.n_vocab = self.encoding.n_vocab
        self.end_ids = [self.special['<|endoftext|>']]
        self.mask_takes_space = name not in ('char', 'byte')  # [MASK] hides a word and its space

    def id(self, text):
        """The id of a special token, by our name for it."""
        require(text in self.special, f"the tokenizer ({self.name}) has no token {text}: choose "
                "another")
        return self.special[text]

    @property
    def end_id(self):
        return self.end_ids[0]

    @property
    def pad_id(self):
        return self.special['[PAD]']

    @property
    def start_id(self):
        """The first input of a decoder: what stands before a target, or before an empty prompt."""
        # open_huggingface names tokens of other models <|start|>, <|bos|> and <|source|>
        return self.special.get('<|start|>', self.special.get('<|bos|>', self.end_id))

    @property
    def source_ids(self):
        """What stands before a source or a document: none, or <s> of a Llama."""
        return [*pick(self.special, '<|source|>').values()]

    def encode(self, text):
        """text -> ids (T,), uint32 (for torch: .tolist()). ValueError if a character is unknown."""
        if self.name == 'char':
            for c in dict.fromkeys(text):
                if c.encode(errors='replace') not in self.ranks:
                    i = text.index(c)  # in a piece of a large file, so what is around it helps
                    raise ValueError(f"the tokenizer has never seen {c!r} (character {i + 1} of "
                                     f"the text): {text[max(0, i - 20):i + 20]!r}")
        chunks = (text[i:i + PIECE] for i in range(0, len(text), PIECE))
        return np.concatenate([self.encoding.encode_to_numpy(piece, disallowed_special=())
                               for piece in safe_pieces(chunks)])

    def encode_batch(self, texts):
        """The ids of many texts, on all cores: tiktoken releases Python's lock."""
        with ThreadPoolExecutor() as threads:
            return list(threads.map(self.encode, texts))

    def encode_with_offsets(self, text):
        """
        text -> ids (T,) and offsets (T, 2): a token at offsets a, b has bytes of all characters in
        text[a:b]. Each CJK character or sign is encoded alone: an answer or entity may end there.
        """
        ids = np.concatenate([self.encode(piece) for piece in split_cjk(text)])
        ends = np.cumsum([0, *map(len, self.encoding.decode_tokens_bytes(ids.tolist()))])
        # The bytes of a character after its first one are 10xxxxxx.
        is_first = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
        character = np.cumsum(is_first) - 1  # the place of each byte's character
        return ids, np.stack([character[ends[:-1]], character[ends[1:] - 1] + 1], axis=1)

    def decode(self, ids):
        return self.encoding.decode(list(ids))

    def text_of(self, ids):
        """ids (T,) without the tokens that begin and end documents."""
        return ids[(ids != self.start_id) & (ids != self.end_id)]

    def token_bytes(self, i):
        """What one token adds to a text."""
        return self.encoding.decode_single_token_bytes(i)

    def to_dict(self):
        """Plain data, for JSON and checkpoints."""
        tokens = sorted(self.ranks, key=self.ranks.get)
        return {'format': FORMAT, 'name': self.name, 'pattern': self.pattern,
                'special': self.special,
                'tokens': [base64.b64encode(token).decode() for token in tokens]}

    @staticmethod
    def from_dict(saved):
        require(saved.get('format') == FORMAT,
                f"this is no tokenizer of this version: its format is not {FORMAT!r}")
        if saved['name'] == HFTokenizer.name:
            return HFTokenizer(saved['engine'], saved['special'], saved['end_ids'])
        ranks = {base64.b64decode(token): i for i, token in enumerate(saved['tokens'])}
        return Tokenizer(saved['name'], saved['pattern'], ranks, saved['special'])

    def export_files(self, vocab_size, arch, task=''):
        """
        {file name: data} for transformers, with those special tokens whose id is below vocab_size.
        In transformers the tokenizer itself adds [CLS] and the like, as `arch` reads them here.
        """
        return export_tokenizer(self, vocab_size, arch, task)

def char_tokenizer(characters):
    """One token for each character of the text."""
    return Tokenizer('char', EACH, {c.encode(): i for i, c in enumerate(sorted(characters))})

def byte_tokenizer():
    """256 tokens, which can write any text."""
    return Tokenizer('byte', EACH, {bytes([b]): b for b in range(256)})

def bpe_tokenizer(texts, vocab_size):
    """A byte-level BPE learned from texts. vocab_size counts the special tokens too."""
    least = 256 + len(SPECIALS)
    require(vocab_size >= least, f"--vocab_size {vocab_size}: bpe has all bytes and some special "
            f"tokens: choose at least {least}")
    counts = collections.Counter()
    for text in texts:  # a long piece, such as DNA, is cut: a merge searches whole pieces
        counts.update(piece[i:i + 100] for piece in regex.findall(WORDS, text)
                      for i in range(0, len(piece), 100))
    return Tokenizer('bpe', WORDS, train_bpe(counts, vocab_size - len(SPECIALS)))

def gpt2_tokenizer():
    """The tokenizer of GPT-2, with our special tokens after its own 50,257."""
    try:
        base = tiktoken.get_encoding('gpt2')  # a download the first time, to TIKTOKEN_CACHE_DIR
    except Exception as e:
        raise ValueError(f"the tokenizer gpt2 cannot be downloaded ({e}): go online once, or "
                         "choose another --tokenizer") from None
    return Tokenizer('gpt2', base._pat_str, base._mergeable_ranks, base._special_tokens)

# scripts without spaces between words (Thai and its neighbours, too): each character is a word
CJK = regex.compile(r'[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]')
WIDE = '\u3001-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65'      # CJK's signs
APART = f'{CJK.pattern}|[{WIDE}]'  # what split_cjk makes a piece of its own

def split_cjk(text):
    """Cut a text into each CJK character or sign, and the texts between them."""
    return [*filter(None, regex.split(f'({APART})', text))] or ['']

WITH_OFFSETS = ('tag', 'qa')  # tasks about places in a text, cut by encode_with_offsets

def explain(tokenizer, text):
    """How a text becomes tokens, as lines: the pieces, and in each the merges in their order."""
    ids = tokenizer.encode(text).tolist()
    has_merges = tokenizer.name in ('bpe', 'gpt2')
    for piece in regex.findall(tokenizer.pattern, text) if has_merges else []:
        parts, why = [bytes([b]) for b in piece.encode()], 'bytes'
        yield render_bytes(piece.encode())
        while True:
            yield f"    {' '.join(map(render_bytes, parts)):<40} {why}"
            found = [(tokenizer.ranks[a + b], (a, b)) for a, b in itertools.pairwise(parts)
                     if a + b in tokenizer.ranks]
            if not found:
                break
            rank, pair = min(found)  # the merge that was learned first
            why = f"{' + '.join(map(render_bytes, pair))} = token {rank}"
            parts = merge(parts, pair, b''.join(pair))
    yield f"{len(ids):,} tokens: " + ', '.join(f'{render_token(tokenizer, i)} {i}' for i in ids)

SIGNS = str.maketrans(' \n\r\t', '␣⏎␍⇥')

def render_bytes(data):
    """Bytes as printable text: ␣ is a space, ⏎ a line end, ‹E6 98› part of a character."""
    as_hex = lambda match: f"‹{match[0].encode(errors='surrogateescape').hex(' ').upper()}›"
    text = data.decode(errors='surrogateescape').translate(SIGNS)
    text = re.sub('[\udc80-\udcff]+', as_hex, text)
    return ''.join(c if c.isprintable() else f'‹U+{ord(c):04X}›' for c in text)

def render_token(tokenizer, i):
    """A token as printable text."""
    if i in tokenizer.special.values():
        return tokenizer.decode([i])
    return render_bytes(tokenizer.token_bytes(i))

# -----------------------------------------------------------------------------
# Examples of tasks. `..._examples` turns a row, a dict that functions below read from a file, into
# examples: dicts of the arguments of model.forward(), and of `meta`, which only scores and answers
# need. All four take the same arguments, as encode_rows gives them. Rows from sample.py --start
# have no label, tags, answers or target.

IGNORE_INDEX = -100  # a position without a target, as in model.py

def add_special_tokens(tokenizer, *texts):
    """
    One or two texts, given as ids, as BERT reads them: section 3 of [3].

        ids         [CLS] the cat sat [SEP] on the mat [SEP]
        segments      0    0   0   0    0   1   1   1    1
    """
    ids, segments = [tokenizer.id('[CLS]')], [0]
    for segment, text in enumerate(texts):
        ids += [*text, tokenizer.id('[SEP]')]
        segments += [segment] * (len(text) + 1)
    return ids, segments

def class_of(label, labels):
    """The number of a label. Raises ValueError where the model does not know it."""
    require(label in labels,
            f"the label {label[:40]!r} is unknown: choose one of {some_of(labels)}")
    return labels.index(label)

def classify_examples(tokenizer, row, labels, block_size):
    """
    One class for a text, or for a pair of texts. The longer text is cut at its end, until all fits.

        ids        [CLS] a funny film [SEP]
        targets    1                           of the labels negative, positive
    """
    texts = [tokenizer.encode(text).tolist() for text in pick(row, 'text', 'text_b').values()]
    by_length = sorted(texts, key=len)  # at a tie the text that was shorter is cut
    while sum(map(len, texts)) > block_size - 1 - len(texts):
        max(by_length, key=len).pop()
    ids, segments = add_special_tokens(tokenizer, *texts)
    example = {'ids': ids, 'segments': segments, 'meta': pick(row, 'label', 'text', 'text_b')}
    if 'label' in row:
        example['targets'] = class_of(row['label'], labels)
    return [example]

def tag_examples(tokenizer, row, labels, block_size):
    """
    One class for each word, predicted at its first token [3, section 5.3]. Row and meta call words
    `tokens`, as CoNLL does. A text longer than block_size is cut into several examples.

        words           Angela       Merkel       spoke
        ids       [CLS] Ang  ela     Mer  kel     spoke [SEP]
        targets   .     B-person .   I-person .   O     .       a dot is IGNORE_INDEX

    meta: `first` is the place in ids of the first token of each word, or -1 for a word without a
    token of its own: some tokenizers drop characters such as U+200B.
    """
    words, room, examples = row['tokens'], block_size - 2, []
    gap = ' ' * (tokenizer.name != 'char' or b' ' in tokenizer.ranks)  # char may know no space
    ids, offsets = tokenizer.encode_with_offsets(gap.join(words))
    ends = np.cumsum([len(word + gap) for word in words])  # of each word and its space
    ids_of = [[] for _ in words]
    for i, owner in zip(ids.tolist(), np.searchsorted(ends, offsets[:, 1])):
        ids_of[owner].append(i)                             # the word in which it ends
    parts, part = [], []  # parts: (number of the first word, ids, places of first tokens)
    for i, word_ids in enumerate(ids_of):
        if not parts or len(part) + len(word_ids) > room:
            part, first = [], []
            parts.append((i, part, first))
        first.append(len(part) + 1 if word_ids else -1)
        part += word_ids[:room]
    for begin, part, first in parts:
        here = slice(begin, begin + len(first))
        framed, _ = add_special_tokens(tokenizer, part)
        meta = pick(row, 'text') | {'tokens': words[here], 'first': first}
        example = {'ids': framed, 'meta': meta}
        if 'tags' in row:
            meta['tags'] = row['tags'][here]
            example['targets'] = [IGNORE_INDEX] * len(framed)
            for place, tag in zip(first, meta['tags']):
                if place >= 0:
                    example['targets'][place] = class_of(tag, labels)
        examples.append(example)
    return examples

def encode_parts(tokenizer, text, cuts=()):
    """
    text -> ids (T,) and offsets (T, 2). No token crosses one of the `cuts`. Accents and vowel signs
    that a tokenizer drops are included in the offsets of the token before them.
    """
    parts = []
    for begin, end in itertools.pairwise([0, *cuts, len(text)]):
        ids, offsets = tokenizer.encode_with_offsets(text[begin:end])
        parts.append((ids, offsets + begin))
    ids, offsets = map(np.concatenate, zip(*parts))
    gaps = np.append(offsets[1:, 0], len(text)) - offsets[:, 1]            # after each token
    for i in np.flatnonzero(gaps > 0):
        begin = offsets[i, 1]
        offsets[i, 1] += len(regex.match(r'\p{M}*', text[begin:begin + gaps[i]])[0])
    return ids, offsets

def qa_examples(tokenizer, row, labels, block_size):
    """
    Where in the context are the first and the last token of the answer? A long context is cut into
    windows that overlap by half; each is an example. If a window does not hold the whole answer,
    both targets are 0, the place of [CLS]. A token that crosses an end of the answer (such as a
    Korean word with its suffix) is cut there. As the cut gives the answer away, the F1 of train.py
    is then too high; sample.py --score FILE makes no such cuts, and its F1 is right.

        ids       [CLS] which city [SEP] Oslo is old . [SEP]
        targets   4, 4                                          of Oslo

    meta: `context` is the text of the window, `start` its place in the whole context, `first` the
    place of its first token in ids, and `offsets` the place of each of its tokens in `context`.
    """
    question = tokenizer.encode_with_offsets(row['question'])[0].tolist()[:block_size // 2]
    # size: tokens of a window; place: where they begin in ids; left, right: the answer's tokens
    context, size, place = row['context'], block_size - 3 - len(question), len(question) + 2
    if row.get('answers'):
        start, answer = row['answers'][0]
        stop = start + len(answer)
        for cuts in ((), (start, stop)):  # cut if a token crosses an end of the answer
            ids, offsets = encode_parts(tokenizer, context, cuts)
            left = bisect.bisect_right(offsets[:, 1], start)       # first token: ends after start
            right = bisect.bisect_left(offsets[:, 0], stop) - 1    # last one: begins before stop
            require(left <= right, f"the tokenizer has no token for the answer {answer[:40]!r}: "
                    "leave it out, or choose another tokenizer")
            if context[offsets[left, 0]:offsets[right, 1]].strip() == answer.strip():
                break
        require(right - left < size, f"the answer {answer[:40]!r} and its question have too many "
                f"tokens for block_size={block_size}: prepare (and train) with a larger one")
    else:
        ids, offsets = encode_parts(tokenizer, context)
        left = right = -1  # in no window
    holds = lambda begin: begin <= left and right < begin + size
    last_begin = max(0, len(ids) - size)
    begins = {*range(0, last_begin, max(1, size // 2)), last_begin}
    if left >= 0 and not any(map(holds, begins)):  # no window holds the whole answer
        begins.add(left)
    examples = []
    for begin in sorted(begins):
        window, window_offsets = ids[begin:begin + size].tolist(), offsets[begin:begin + size]
        low, *_, high = window_offsets.ravel().tolist() or (0, 0)            # first begin, last end
        framed, segments = add_special_tokens(tokenizer, question, window)
        meta = {'question': row['question'], 'context': context[low:high], 'start': low,
                'first': place, 'offsets': (window_offsets - low).tolist()}
        example = {'ids': framed, 'segments': segments, 'meta': meta}
        if 'answers' in row:
            shift = place - begin  # from a place among the context's tokens to ids
            example['targets'] = [left + shift, right + shift] if holds(begin) else [0, 0]
            meta |= {'id': row['id'], 'answers': [text for _, text in row['answers']]}
        examples.append(example)
    return examples

def seq2seq_examples(tokenizer, row, labels, block_size):
    """
    A text in, a text out. The decoder reads <|endoftext|> (or the start_id of another model), then
    the target. After each of these it must predict the next token of the target (teacher forcing),
    and at the end <|endoftext|>. A source begins with the source_ids of another model, if any.

        ids            twenty one <|endoftext|>
        decoder_ids    <|endoftext|> 2 1
        targets        2 1 <|endoftext|>
    """
    example = {'meta': pick(row, 'source', 'target')}
    for name, text in example['meta'].items():
        ids = [*tokenizer.encode(text).tolist(), tokenizer.end_id]
        if name == 'source':
            example['ids'] = ids = [*tokenizer.source_ids, *ids]
        else:
            example |= {'decoder_ids': [tokenizer.start_id, *ids[:-1]], 'targets': ids}
        require(len(ids) <= block_size, f"the {name} {text[:40]!r} has {len(ids)} tokens, more "
                f"than block_size={block_size}: shorten it, or prepare (and train) with a larger "
                "one")
    return [example]

# -----------------------------------------------------------------------------
# Text from files is read a piece at a time, so a corpus may be larger than memory

# Where a long text may be cut, since no match of WORDS crosses these places: after a line end, or
# before the last of several line ends, if no white space follows; before a space, but not after >:
# if a cut followed <|endoftext|>, MARKER would take it for a whole line, which ends a
# document. (?r) searches from the end.
CUT = regex.compile(r'(?r)(?<=\S\n)(?=\S)|(?<=\n)(?=\n\S)|(?<=[^\s>])(?= \S)')
PIECE = 100_000  # characters to encode at once: tiktoken fails at a million blanks in a row

def safe_pieces(texts, size=PIECE):
    """
    Join texts, each of at most `size` characters, and cut the whole into pieces of about `size`
    characters at places of CUT, where no token is cut. If there is no such place, a piece ends
    anywhere after 2 * size characters.
    """
    rest = ''
    for text in texts:
        rest += text
        found = len(rest) >= size and CUT.search(rest)
        if found or len(rest) >= 2 * size:
            cut = found.start() if found else len(rest)
            yield rest[:cut]
            rest = rest[cut:]
    yield rest

MARKER = re.compile(r'(?m)^<\|endoftext\|>[ \t]*(?:\n|\Z)')  # on its own line it ends a document

def find_files(paths):
    """paths -> files, each once. A folder stands for its files, sorted, without hidden ones."""
    found, seen = [], set()

    def visit(path):
        real = os.path.realpath(path)
        if real not in seen:  # links may lead in circles
            seen.add(real)
            if os.path.isdir(path):
                for name in sorted(os.listdir(path)):
                    if not name.startswith('.'):
                        visit(os.path.join(path, name))
            else:
                found.append(str(path))

    for path in paths:
        visit(path)
    wrong = [path for path in found or paths if not os.path.isfile(path)]
    if wrong:
        raise ValueError(f"{wrong[0]} is no file (save a pipe as one), nor a folder of files: give "
                         "another, or leave it out")
    return found

def refuse_pointer(path, f):
    """Raise ValueError where f, open as bytes, is a pointer that git-LFS left in its place."""
    require(not f.peek(19).startswith(b'version https://git'),
            f"{path} is a git-LFS pointer: fetch the file itself")

def read_text(path, size=None):
    """The lines of a text file, or pieces of `size` characters. Raises ValueError at a bad byte."""
    with open(path, encoding='utf-8-sig') as f:  # -sig: skip a byte order mark
        refuse_pointer(path, f.buffer)
        begin = f.buffer.peek()
        require(4 * begin.count(0) <= len(begin) or not begin[:1].isascii(), f"{path} has too many "
                "zero bytes to be UTF-8, as UTF-16 or .bin has: convert it, or leave it out")
        try:
            yield from iter(lambda: f.read(size), '') if size else f
        except UnicodeDecodeError as e:
            offset = f.buffer.tell() - len(e.object) + e.start
            raise ValueError(f"{path} is not UTF-8 (the byte at offset {offset}): unpack or "
                             "convert it, or leave it out") from None

def read_lines(path):
    """(number, line) of every line of a text file, counted from 1."""
    for n, line in enumerate(read_text(path), 1):
        # without the byte order marks of joined files (alone, U+FEFF may be a token)
        yield n, re.sub('^\ufeff+(?![\ufeff \t])', '', line.removesuffix('\n'))

def is_json_lines(path):
    """
    Whether the first line of a file is a JSON object. Raises ValueError at other JSON in a .json
    file: as text, its keys and quotes would be learned, too.
    """
    begin = next(read_text(path, 1000), '').lstrip() if os.path.isfile(path) else ''  # no pipe
    as_rows = re.match(r'\{[ \t]*"[^"\n]*"\s*:[^\t\n]*(\n|$)', begin)  # a tab: columns
    require(as_rows or begin[:1] not in ('[', '{', '"') or 'json' not in Path(path).suffix.lower(),
            f"{path} is no text: write it as JSON lines, an object a line, or leave it out")
    return as_rows

def read_rows(path, *names):
    """Yields (line number, texts) of each row: columns between tabs, or JSON values for `names`."""
    as_json, unread = is_json_lines(path), set()
    for n, line in read_lines(path):
        if not as_json:
            yield n, line.split('\t')
        elif line.strip():
            try:
                row = json.loads(line, parse_constant=lambda name: None)  # NaN is null
                if isinstance(row.get('label'), (int, float)):
                    row['label'] = json.dumps(row['label'])
                texts = [row[name] for name in names
                         if name in names[:2] or row.get(name) is not None]
                ''.join(texts).encode()  # each a text, and no half of a surrogate pair
                unread |= row.keys() - names
            except Exception:
                raise ValueError(f"{path}, line {n}: a row must be JSON with a text for "
                                 f"{' and '.join(names[:2])}: mend it or rename its keys, or leave "
                                 "it out") from None
            yield n, texts
    if unread and len(names) > 1:  # plain text may have any others
        to_stderr(f"{path}: not read: {', '.join(sorted(unread))}")

def read_pieces(paths):
    """
    Yields the text of files in pieces of about PIECE characters, and '' where a document ends:
    after each row of JSON lines, at lines that hold only <|endoftext|>, at the end of other files.
    """
    for path in paths:
        if is_json_lines(path):
            for _, (text,) in read_rows(path, 'text'):
                yield from (text, '')
            continue
        for piece in safe_pieces(read_text(path, PIECE)):
            text, *others = MARKER.split(piece)
            yield text
            for text in others:
                yield from ('', text)
        yield ''

def part(pieces, begin, end):
    """Yields characters begin to end of the joined pieces; keeps '', the ends of documents."""
    at = 0
    for piece in pieces:
        if at > end:
            break
        text = piece[max(0, begin - at):end - at]
        if text or not piece:
            yield text
        at += len(piece)

# -----------------------------------------------------------------------------
# Rows from files: dicts of texts, and `where` (file, line)

# names of columns: if the first line has only these, it is a header
HEADERS = '''abstract answer answers article category chinese class completion content context
    description dialogue document english french german gold_label headline highlights hypothesis
    input input_text inputs instruction italian japanese label labels output portuguese premise
    prompt query question response review russian sentence sentence1 sentence2 sentiment source
    source_text spanish src src_text summary target target_text targets text text_a text_b texts tgt
    tgt_text title translation trg ar cn cs de en eng es fr fra hi it ja ko nl pt ro ru tr vi zh
    中文 英文 汉语 英语 日语 韩语 法语 德语 俄语 源 目标 源文本 目标文本 原文 译文 标签 类别
    文本 正文 内容 评论 句子 标题 摘要 问题 答案'''.split()

def read_columns(path, *names):
    """Rows of columns with these names, of which the third may be missing: tabs, or JSON lines."""
    columns = '<TAB>'.join(names[:2]) + ''.join(f'[<TAB>{name}]' for name in names[2:])
    is_label, as_json, blank = names[0] == 'label', is_json_lines(path), 0
    for n, texts in read_rows(path, *names):
        where, filled = f'{path}, line {n}', [*filter(str.strip, texts)]
        if not filled:  # an empty line; in text to text, wrong before another row
            blank = blank or n
            continue
        require(is_label or not blank, f"{path}, line {blank} is empty, and must be {columns}")
        is_header = n == 1 and all(text.strip(' "').lower() in HEADERS for text in texts)
        require(not is_header, f"{where} looks like a header: leave it out")
        require(filled == texts and 2 <= len(texts) <= len(names),
                f"{where}: {filled[0][:40]!r} ... must be {columns}, none of them empty")
        for name, text in zip(names, texts):  # a text may be a quotation: "" in it shows CSV
            quoted = '(?s)".+"' if name == 'label' else r'"([^"]|"")*""([^"]|"")*"'
            require(as_json or not re.fullmatch(quoted, text),
                    f"{where}: {text[:40]} is quoted, as in CSV: write it unquoted")
        if is_label:  # as sample.py strips what it labels
            label = unicodedata.normalize('NFC', ' '.join(texts[0].split()))  # é as one sign
            texts = [label, *map(str.strip, texts[1:])]
        yield dict(zip(names, texts), where=where)

def read_tagged(path):
    """
    CoNLL: a token a line, its tag in the last column, and a blank line between texts. A CJK word is
    cut into its characters, as sample.py cuts what a user writes without spaces.
    """
    row, columns, counted, begins, texts = None, 0, set(), set(), 0
    for n, line in itertools.chain(read_lines(path), [(0, '')]):  # '' ends the last text
        if line.strip(' \t') and not line.startswith('-DOCSTART-'):
            fields = re.split(' *\t' if '\t' in line else ' +', line.strip(' '))
            columns = columns or max(2, len(fields))
            token, tag = fields[0], fields[-1]
            begins.add(re.match('([a-z]+:)?', token)[0])
            require(len(fields) == columns and token and re.fullmatch(r'O|[BI]-\S+', tag),
                    f"{path}, line {n}: {line[:40]!r} must have {columns} columns (no JSON), "
                    "first a token, last its tag: O, B-kind or I-kind (S- is B-, M- and E- are I- "
                    "here: write them so)")
            row = row or {'where': f'{path}, line {n}', 'tokens': [], 'tags': []}
            parts = split_cjk(token)
            row['tokens'] += parts
            row['tags'] += [tag, *[re.sub('^B', 'I', tag)] * (len(parts) - 1)]
        elif row:
            tokens = row['tokens']
            if len(tokens) > 1:  # is this column 1 2 3, a count, or 7 7 7, the number of a text?
                counted.add(''.join(tokens).isdecimal() or len({*tokens}) == 1)
            yield row
            row, texts = None, texts + 1
    require(columns <= 2 or counted != {True},  # in all texts
            f"{path}: the first column counts tokens or texts: leave it out")
    require(len(begins) != 1 or begins == {''},  # WikiANN
            f"{path}: all tokens begin with {', '.join(begins)}: leave that out")
    if texts > 9 and not counted:
        to_stderr(f"{path}: each of {texts} texts has one token: are there blank lines between "
                  "tokens?")

def read_questions(path):
    """SQuAD's JSON [4]: data > paragraphs > context, qas > question, answers > answer_start."""
    rows, wrong, where, text = [], [], path, ''.join(read_text(path))
    lines = (n for n, line in enumerate(text.split('\n'), 1)
             for _ in re.findall(r'"question"\s*:', line))
    try:
        for article in json.loads(text)['data']:
            for paragraph in article['paragraphs']:
                context = paragraph['context']
                for question in paragraph['qas']:
                    where = f"{path}, line {next(lines, 1)} (question {question['id']})"
                    require(isinstance(question.get('answers'), list), "it has no answers")
                    answers = [(a['answer_start'], a['text']) for a in question['answers']
                               if not question.get('is_impossible')]  # else only plausible
                    rows.append({'where': where, 'id': question['id'], 'context': context,
                                 'question': question['question'].strip(), 'answers': answers})
                    (context + question['question']).encode()  # no half of a surrogate pair
                    for start, answer in answers[:1]:  # the others only score
                        if start < 0 or not (context.startswith(answer, start) and answer.strip()):
                            wrong.append(f"{answer[:40]!r} of {where}")
    except Exception as e:
        raise ValueError(f"{where}: not as in SQuAD's JSON ({e}): an object, data > paragraphs > "
                         "context and qas, each with a list of answers, maybe empty") from None
    if wrong:
        raise ValueError(f"{len(wrong)} answers are not at their answer_start, first {wrong[0]}: "
                         "count characters from 0; without an answer, the list is empty")
    return rows

# -----------------------------------------------------------------------------
# Tasks: from the rows of a file to examples

def texts_of(row):
    """The texts of a row, from which a tokenizer may learn."""
    texts = [v for k, v in row.items() if isinstance(v, str) and k not in ('where', 'label', 'id')]
    return [*texts, ' '.join(row.get('tokens', []))]

def tag_names(labels):
    """O, and for each kind B-kind and I-kind, seen or not."""
    kinds = sorted({label[2:] for label in labels} - {''})
    return ['O', *(prefix + kind for kind in kinds for prefix in ('B-', 'I-'))]

class Task(NamedTuple):
    """
    One kind of labelled data. To add one, put a row into DECODERS and SCORES of sample.py, too.
    There BEST_SCORES (with LOWER_IS_BETTER) names the scores that choose best.pt, and examples_of
    reads what a user writes, if more than a text. TaskModel reads a text as for classify.
    """
    read: Callable                          # path -> rows
    examples: Callable                      # (tokenizer, row, labels, block_size) -> examples
    labels_of: Callable = lambda row: []    # row -> its labels
    label_names: Callable = sorted          # the labels of all rows -> a list to choose from
    has_head: bool = True                   # False: the model writes text

TASKS = {
    'classify': Task(lambda path: read_columns(path, 'label', 'text', 'text_b'),
                     classify_examples, lambda row: [row['label']]),
    'tag': Task(read_tagged, tag_examples, lambda row: row['tags'], tag_names),
    'qa': Task(read_questions, qa_examples,
               lambda row: [] if row['answers'] else ['no answer']),
    'seq2seq': Task(lambda path: read_columns(path, 'source', 'target'), seq2seq_examples,
                    has_head=False),
}

def split_rows(rows, val_fraction):
    """
    Shuffle rows, the same way every time, and split them into (train rows, val rows). Questions
    about one context stay together: otherwise val would ask about texts that train has, too.
    """
    groups, train, val = collections.defaultdict(list), [], []
    for i, row in enumerate(rows):
        groups[row.get('context', i)].append(row)
    groups = [*groups.values()]
    for i in np.random.default_rng(0).permutation(len(groups)):
        fits = len(train) + len(groups[i]) <= round(len(rows) * (1 - val_fraction))
        (train if fits or not train else val).extend(groups[i])
    return train, val

def encode_rows(tokenizer, task, rows, labels, block_size):
    """The examples of all rows; `row` in meta is the number of the row. Raises ValueError."""
    examples, wrong = [], []
    for i, row in enumerate(rows):
        if task == 'seq2seq':  # as sample.py strips what a user writes
            row = row | {'source': row['source'].strip()}
        try:
            made = TASKS[task].examples(tokenizer, row, labels, block_size)
        except ValueError as e:
            wrong.append(f"{row['where']}: {e}" if 'where' in row else str(e))
            continue
        for example in made:
            example['meta']['row'] = i
        examples += made
        progress(f"encoding: row {i:,} of {len(rows):,}")
    progress('')
    if wrong:
        raise ValueError(wrong[0] + f" (one of {len(wrong):,} such rows)" * (len(wrong) > 1))
    return examples

# -----------------------------------------------------------------------------
# Folders, written as a whole or not at all

def write_json(path, data):
    text = json.dumps(data, ensure_ascii=False, indent=1)
    Path(path).write_text(text, encoding='utf-8', errors='replace')  # of a file's name

def read_any(folder, name):
    """The JSON of a file; {} where the folder lacks it."""
    path = Path(folder, name)
    return json.loads(path.read_bytes()) if path.exists() else {}

@contextlib.contextmanager
def new_folder(path):
    """
    with new_folder(path) as temporary: ... The folder gets its name when all of it is written, in
    the place of an older data folder that holds nothing else; after an error all is as before.
    """
    path = Path(path).resolve()  # a link stays a link
    meta = path / 'meta.json'
    is_data = meta.exists() and b'plainformer data' in meta.read_bytes()
    ours = r'(meta|tokenizer)\.json|(train|val)\.jsonl|.*\.bin|source(\.val)?\.txt|\.DS_Store'
    for old in path.iterdir() if path.exists() else ():
        require(is_data and re.fullmatch(ours, old.name),
                f"--out_dir {path} holds {old.name}, which is no data: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.') as temporary:
        new, old = Path(temporary, 'new'), Path(temporary, 'old')
        new.mkdir()
        yield new
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:  # Windows refuses while a virus scanner reads what is new
            if not path.exists() and old.exists():
                old.rename(path)

def sha256_of(paths):
    digest = hashlib.sha256()
    for path in paths:
        with open(path, 'rb') as f:
            hashlib.file_digest(f, lambda: digest)  # goes on with this one, over all files
    return digest.hexdigest()

def write_ids(path, dtype, tokenizer, pieces):
    """Write the ids of pieces, as read_pieces yields them. Returns the counts for meta.json."""
    counts = collections.Counter()
    is_open = False  # True: inside of a document
    pieces = iter(pieces)
    with open(path, 'wb') as f:
        while batch := [*itertools.islice(pieces, 100)]:
            encoded = iter(tokenizer.encode_batch(filter(None, batch)))
            for text in batch:
                ids = next(encoded) if text else []
                opens = len(ids) > 0 and not is_open
                if opens:
                    ids, is_open = np.append(tokenizer.source_ids, ids), True
                elif is_open and not text:
                    ids, is_open = np.append(ids, tokenizer.end_id), False
                f.write(np.array(ids, dtype).tobytes())
                counts.update(tokens=len(ids), characters=len(text), documents=int(opens),
                              bytes=len(text.encode()))
            progress(f"encoding: {counts['characters'] / 1e6:,.1f} M characters")
    return counts

# -----------------------------------------------------------------------------
# Built-in data sets. A function takes the downloaded files, if there are any, and returns one text,
# or two: one to train on, one to validate on

UPSTREAM = 'https://raw.githubusercontent.com/'
DOWNLOADS = {  # a folder below UPSTREAM, and the sha256 of files in it
    'shakespeare': (
        'karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare', {
        'input.txt': '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'}),
    'rotten_tomatoes': ('yoonkim/CNN_sentence/23e0e1f7355705bb083043fda05c031b15acb38c', {
        'rt-polarity.pos': '2da124ec187a9d5a29c9f04e91c540e02baed5af8868f550a26bd6fd4dbf8bf0',
        'rt-polarity.neg': '4ace77d558c3714723843f1d65b60c01e3417b208180f0728808d76ad0eeeaca'}),
    'wnut17': ('leondz/emerging_entities_17/e52a2d2a71ac1a051ca2d532eef28653c5c02603', {
        'wnut17train.conll': '731820e13f71af324c6b55a1575ec2ce59fbaa2a0806f8f0400b98d56cd6a7a5',
        'emerging.dev.conll': 'e053b752b8155113ca66e7db08af5f2f5f43ab993694e4774f1ec5bad42312d8'}),
    'multi30k': ('multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw', {
        'train.en.gz': 'd79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f',
        'train.de.gz': '726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6',
        'val.en.gz': '14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28',
        'val.de.gz': 'f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a'}),
}

def download(name, mirror):
    """Yield the bytes of each file of a data set. mirror: URL or folder instead of UPSTREAM."""
    folder, files = DOWNLOADS.get(name, ('', {}))
    for file, sha256 in files.items():
        address = f"{(mirror or UPSTREAM).rstrip('/')}/{folder}/{file}"
        progress(f"downloading {address}")
        try:
            data = (urllib.request.urlopen(address, timeout=60).read() if '://' in address
                    else Path(address).read_bytes())
        except Exception as e:
            raise ValueError(f"{address} could not be read ({e}): go online, or give another "
                             "--mirror URL or FOLDER") from None
        progress('')
        require(hashlib.sha256(data).hexdigest() == sha256,
                f"{address}: its sha256 is not {sha256}: give another --mirror")
        yield data

def as_they_are(*files):
    """
    shakespeare: 1.1 MB of plays, in English. wnut17: names in tweets and comments (Derczynski et
    al. 2017), CoNLL; those of val do not occur in train.
    """
    return [data.decode() for data in files]

def rotten_tomatoes(positive, negative):
    """10,662 sentences of film reviews (Pang and Lee 2005), 80 % to train, 10 % to validate."""
    rows = [f'{label}\t{line.strip()}\n'
            for label, data in (('positive', positive), ('negative', negative))
            for line in data.decode('cp1252').strip().split('\n')]
    random.Random(0).shuffle(rows)
    train, val = int(0.8 * len(rows)), int(0.9 * len(rows))  # the rest is for tests
    return [''.join(rows[:train]), ''.join(rows[train:val])]

def multi30k(*files):
    """29,000 captions of pictures, English to German (Elliott et al. 2016), and 1,014 for val."""
    sides = [[' '.join(line.split())
              for line in gzip.decompress(data).decode().strip('\n').split('\n')]
             for data in files]
    return [''.join(f'{source}\t{target}\n' for source, target in zip(*pair, strict=True))
            for pair in (sides[:2], sides[2:])]

def shuffled(texts):
    """Texts sorted by their hash: in an order without meaning, but the same everywhere."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())

def library():
    """(name, source) of the modules of Python's own library, as bytes. They are not imported."""
    root = os.path.dirname(os.__file__)
    skip = 'site-packages test tests idlelib lib2to3 __pycache__'.split()
    for folder, folders, _ in os.walk(root):
        folders[:] = set(folders).difference(skip)
        for path in Path(folder).glob('*.py'):
            module = '.'.join(path.relative_to(root).with_suffix('').parts)
            yield module.removesuffix('.__init__'), path.read_bytes()

def docstrings(node, title, prefix=''):
    """(title, docstring or None) of a module or class, and of the classes and functions in it."""
    yield title, ast.get_docstring(node)
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            name = prefix + child.name
            yield from docstrings(child, f'class {name}', f'{name}.')
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f'{prefix}{child.name}({ast.unparse(child.args)})', ast.get_docstring(child)

def documented_library():
    """(module, [(title, docstring), ...]) of Python's library; its own docstring may be None."""
    for module, source in library():
        with contextlib.suppress(SyntaxError, ValueError):
            found = docstrings(ast.parse(source), module)
            yield module, [(title, text) for title, text in found if text or title == module]

def pydoc():
    """The topics of Python's manual, and the docstrings of its modules: each a document."""
    from pydoc_data.topics import topics
    documents = [f'{name}\n\n{text.strip()}\n' for name, text in topics.items()]
    for module, found in documented_library():
        parts = [f'{title}\n\n{text}\n' if text else f'{title}\n' for title, text in found]
        if found != [(module, None)]:
            documents.append('\n'.join(parts))
    return ['<|endoftext|>\n'.join(shuffled(documents))]

def pytopics():
    """Docstrings of Python's library, labelled by their package: the twelve with the most."""
    texts = collections.defaultdict(set)
    for module, found in documented_library():
        for _, text in found:
            text = ' '.join((text or '').split())
            if len(text) >= 20:
                texts[module.split('.')[0]].add(text)
    most = sorted(texts, key=lambda package: (-len(texts[package]), package))[:12]
    rows = shuffled(f'{package}\t{text}' for package in most for text in texts[package])
    return ['\n'.join(rows)]

def pytokens():
    """
    The kinds of the words of Python source, CoNLL: keyword, name, number, string, comment, and O
    for an operator. The first 32 words of a logical line are a text; a string may have several.
    (sample.py --start cuts words as other corpora do, so write x . y = 1 there.)
    """
    texts = set()
    for _, source in library():
        row = []
        with contextlib.suppress(tokenize.TokenError, SyntaxError, UnicodeDecodeError):
            for token in tokenize.tokenize(io.BytesIO(source).readline):
                kind = tokenize.tok_name[token.type].lower()
                if 'string' in kind:  # also fstring_start, fstring_middle and fstring_end
                    kind = 'string'
                elif keyword.iskeyword(token.string):
                    kind = 'keyword'
                if kind in 'keyword name number string comment op'.split():
                    for i, word in enumerate(token.string.split()):
                        tag = 'O' if kind == 'op' else f"{'I' if i else 'B'}-{kind}"
                        row.append(f'{word}\t{tag}')
                elif kind == 'newline' or (kind == 'nl' and row and row[0].endswith('-comment')):
                    texts.add('\n'.join(row[:32]) + '\n')
                    row = []
    return ['\n'.join(shuffled(texts)[:12_000])]

ONES = ['', *'one two three four five six seven eight nine ten eleven twelve thirteen fourteen '
        'fifteen sixteen seventeen eighteen nineteen'.split()]
TENS = ['', '', *'twenty thirty forty fifty sixty seventy eighty ninety'.split()]

def in_words(n):
    """
    >>> in_words(1_021_100)
    'one million twenty-one thousand one hundred'
    """
    if n < 20:
        return ONES[n]
    if n < 100:
        return f'{TENS[n // 10]}-{ONES[n % 10]}'.rstrip('-')
    for size, name in ((1_000_000, 'million'), (1000, 'thousand'), (100, 'hundred')):
        if n >= size:
            return f'{in_words(n // size)} {name} {in_words(n % size)}'.rstrip()

def numbers():
    """Number words to digits: all below 1,000, and 19,001 below a million."""
    rng, chosen = random.Random(0), set(range(1, 1000))
    while len(chosen) < 20_000:
        chosen.add(rng.randrange(1, 10 ** rng.randint(4, 6)))
    return ['\n'.join(shuffled(f'{in_words(n)}\t{n}' for n in chosen))]

def recall():
    """
    In-context learning: each document draws 8 letters and a digit for each, and then has 30 pairs
    of them, such as k7a2k7x0a2... Only the text before shows which digit a letter has.
    """
    rng, texts = random.Random(0), []
    for n in (40_000, 1000):
        documents = []
        for _ in range(n):
            pairs = [f'{c}{rng.randrange(10)}' for c in rng.sample('abcdefghijklmnopqrstuvwxyz', 8)]
            documents.append(''.join(rng.choices(pairs, k=30)) + '\n')
        texts.append('<|endoftext|>\n'.join(documents))
    return texts

DATASETS = {  # the task, and the function
    'pydoc': ('lm', pydoc), 'recall': ('lm', recall), 'shakespeare': ('lm', as_they_are),
    'pytopics': ('classify', pytopics), 'rotten_tomatoes': ('classify', rotten_tomatoes),
    'pytokens': ('tag', pytokens), 'wnut17': ('tag', as_they_are),
    'numbers': ('seq2seq', numbers), 'multi30k': ('seq2seq', multi30k),
}

# -----------------------------------------------------------------------------
# The tokenizers of other models, as the package `transformers` reads them

# GPT-2's files write each byte as a visible character: most as themselves, others from U+0100 on.
free = itertools.count(256)
VISIBLE = [chr(b if chr(b).isprintable() and b != 32 else next(free)) for b in range(256)]

class HFTokenizer(Tokenizer):
    """The tokenizer of another model (WordPiece, ...). saved: its JSON of `tokenizers`."""
    name = 'huggingface'

    def __init__(self, saved, special, end_ids):
        engine = optional('tokenizers').Tokenizer.from_str(saved)
        engine.no_truncation()  # the file may hold both
        engine.no_padding()
        engine.encode_special_tokens = True  # where they are written in a text, they are text
        self.engine, self.saved, self.special, self.end_ids = engine, saved, special, end_ids
        self.n_vocab = 1 + max(*engine.get_vocab().values(), special.get('<|start|>', 0))
        mask = engine.get_added_tokens_decoder().get(special.get('[MASK]'))
        self.mask_takes_space = getattr(mask, 'lstrip', False)
        unknown = getattr(engine.model, 'unk_token', None) or '<unk>'
        self.unknown = special.get('unknown', engine.token_to_id(unknown))
        if self.unknown in end_ids:  # in GPT-2's files the end has this role, too
            self.unknown = None
        self.marks = [i for i in special.values()  # not words: the end token may be a full stop
                      if re.fullmatch(r'<.+>|\[.+\]', engine.id_to_token(i) or '')]

    def encode_with_offsets(self, text):
        try:  # encode_batch, which is not encode, releases Python's lock
            [encoded] = self.engine.encode_batch([text], add_special_tokens=False)
        except Exception as e:  # half of a surrogate pair, or a word that has no token
            raise ValueError(f"{text[:40]!r} cannot be encoded: {e}") from None
        ids = np.array(encoded.ids, np.uint32)
        if self.unknown is not None:  # SentencePiece finds its special tokens in a text
            ids[np.isin(ids, self.marks)] = self.unknown
        return ids, np.array(encoded.offsets, np.int64).reshape(-1, 2)

    def encode(self, text):
        return self.encode_with_offsets(text)[0]

    def decode(self, ids):
        return self.engine.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, i):
        """What a token adds after another one: for a word of WordPiece, also the space."""
        return self.decode([i, i])[len(self.decode([i])):].encode()

    def to_dict(self):
        return {'format': FORMAT, 'name': self.name, 'special': self.special,
                'end_ids': self.end_ids, 'engine': self.saved}

# Our special tokens, and what each may be in a folder: a role (eos_token) or a text (</s>)
ROLES = {
    '<|endoftext|>': ('eos_token', '</s>', '<|endoftext|>', 'sep_token', '[SEP]'),
    '[PAD]': ('pad_token', '[PAD]', '<pad>'), '[CLS]': ('cls_token', '[CLS]', 'bos_token', '<s>'),
    '[SEP]': ('sep_token', '[SEP]', '</s>'), '[MASK]': ('mask_token', '[MASK]'),
    '<|bos|>': ('bos_token', '<s>'), 'unknown': ('unk_token',),
}

def open_huggingface(folder):
    """The tokenizer of a Hugging Face folder. Raises ValueError where it has no end of a text."""
    if not Path(folder, 'tokenizer.json').exists() and any(Path(folder).glob('*.model')):
        optional('sentencepiece')
        optional('google.protobuf')
    config, about = read_any(folder, 'config.json'), read_any(folder, 'tokenizer_config.json')
    kind = (config | about).get('tokenizer_class') or ''  # Japanese words are cut by a program
    require('Japanese' not in kind, f"tokenizer_class={kind} is not supported here")
    theirs = optional('transformers').AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False)
    written = read_any(folder, 'tokenizer.json').get('model', {}).get('type')
    if written not in (None, type(theirs.backend_tokenizer.model).__name__):
        # SentencePiece by the name of BertTokenizer: there all words would be unknown
        theirs = optional('transformers').PreTrainedTokenizerFast.from_pretrained(folder)
    engine = theirs.backend_tokenizer
    require(len(engine.get_vocab()) > 1 + len(engine.get_added_tokens_decoder()),
            f"{type(theirs).__name__} finds no vocabulary")
    if getattr(engine.normalizer, 'lowercase', False) and not about:
        to_stderr(f"{folder} has no tokenizer_config.json: a BERT becomes lower case, as in "
                  "transformers")
    family = config.get('model_type', 'bert')  # a tokenizer alone may be a BERT's
    cleans = theirs.clean_up_tokenization_spaces and type(engine.model).__name__ != 'BPE'
    if cleans and family != 'bert':
        to_stderr(f"{folder}: not read: clean_up_tokenization_spaces")
    rows = range(config.get('vocab_size', 2 ** 31))  # a model may lack rows for some tokens
    vocab = {text: i for text, i in engine.get_vocab().items() if i in rows}
    special = {f'<extra_{i}>': vocab[text] for i in range(100)
               for text in (f'<extra_id_{i}>', f'<extra_{i}>') if text in vocab}
    for name, keys in ROLES.items():
        for key in keys:
            text = theirs.special_tokens_map.get(key, key)
            if text in vocab:
                special.setdefault(name, vocab[text])
    ends = [special.get('<|endoftext|>')]  # a text ends at each token that a file calls its end
    # What stands before a text: <s> of a Llama, or [CLS] of a BERT (some GPT-2s have it, too)
    engine.no_padding()  # the file may ask for padding, even on the left
    frame = engine.encode('a')
    start = frame.ids[0] if frame.special_tokens_mask[:1] == [1] else None
    if family == 'bert' and start != special.get('<|bos|>'):
        start = None  # add_special_tokens puts [CLS] there
    elif start is not None:
        special['<|source|>'] = start  # a Llama reads <s> text, CodeT5 <s> source </s>
    for settings in (config, read_any(folder, 'generation_config.json')):
        found = settings.get('eos_token_id')
        ends += found if isinstance(found, list) else [found]
        if family == 't5' and settings.get('decoder_start_token_id') is not None:
            start = settings['decoder_start_token_id']  # its decoder begins with another token
    ends = [i for i in dict.fromkeys(ends) if i is not None]
    require(ends, "no token ends a text: it needs a tokenizer_config.json with eos_token")
    for name in SPECIALS[:4]:  # not [MASK]
        special.setdefault(name, ends[0])
    if start is not None:
        require(start in rows, f"texts begin with token {start}, for which the model has no row")
        special['<|start|>'] = start
    # Added tokens without a role, such as [E1] or <|user|>, are not special but ordinary text; an
    # export marks them as they were. Tokens for which the model has no row are left out.
    saved, roles = json.loads(engine.to_str()), {*special.values(), *ends}
    added = [token for token in saved['added_tokens'] if token['id'] in rows]
    for token in added:
        token['was_special'], token['special'] = token['special'], token['id'] in roles
    saved['added_tokens'] = added
    return HFTokenizer(json.dumps(saved), special, ends)

def load_tokenizer(folder):
    """The tokenizer of a data folder, or of a Hugging Face folder. Raises ValueError or OSError."""
    known = {'tokenizer.json', 'vocab.txt', 'vocab.json', 'tokenizer.model', 'spiece.model'}
    if known.isdisjoint(os.listdir(folder)):
        raise FileNotFoundError(f"{folder} has no tokenizer.json: prepare_data.py makes one")
    for path in filter(Path.is_file, Path(folder).glob('*.[jt]*')):
        with path.open('rb') as f:
            refuse_pointer(path, f)
    try:
        saved = read_any(folder, 'tokenizer.json')
        return Tokenizer.from_dict(saved) if 'format' in saved else open_huggingface(folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the file may be damaged, and what panics in Rust is no Exception
        why = ' '.join(f'{type(e).__name__}: {e}'.split())
        raise ValueError(f"{folder}: its tokenizer is damaged or cannot be read here ({why}): "
                         "fetch its tokenizer.json, name its tokenizer_class in "
                         "tokenizer_config.json, or prepare the data, again") from None

def hf_engine(tokenizer, special, task):
    """The same tokenizer in the package `tokenizers`, with the tokens of special {text: id}."""
    if isinstance(tokenizer, HFTokenizer):
        saved = json.loads(tokenizer.saved)
        for token in saved['added_tokens']:
            token['special'] = token.get('was_special', token['special'])
        return HFTokenizer(json.dumps(saved), special, tokenizer.end_ids).engine
    require(tokenizer.name != 'char', "transformers has no tokenizer like char: use byte or bpe")
    vocab = {''.join(VISIBLE[b] for b in token): i for token, i in tokenizer.ranks.items()}
    # all pairs of tokens that can be merged into another token
    merges = [(token[:i], token[i:]) for token in vocab for i in range(1, len(token))
              if token[:i] in vocab and token[i:] in vocab]
    hf = optional('tokenizers')
    engine = hf.Tokenizer(hf.models.BPE(vocab, merges, ignore_merges=True))
    patterns = [APART] * (task in WITH_OFFSETS) + [tokenizer.pattern] * (tokenizer.name != 'byte')
    engine.pre_tokenizer = hf.pre_tokenizers.Sequence([
        *(hf.pre_tokenizers.Split(hf.Regex(pattern), 'isolated') for pattern in patterns),
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    engine.decoder = hf.decoders.ByteLevel()
    engine.add_special_tokens([
        hf.AddedToken(text, lstrip=tokenizer.mask_takes_space and text == '[MASK]')
        for text in sorted(special, key=special.get)])
    return engine

def export_tokenizer(tokenizer, vocab_size, arch, task):
    """What Tokenizer.export_files returns."""
    special = {text: i for text, i in tokenizer.special.items() if i < vocab_size}
    engine, source = hf_engine(tokenizer, special, task), '<|source|> ' * ('<|source|>' in special)
    ends = ' [SEP]' * (task == 'seq2seq')  # of a prompt to complete
    frames = {'bert': ('[CLS] $A [SEP]', '[CLS] $A [SEP] $B:1 [SEP]:1'),
              'gpt': (f'{source}$A{ends}', f'{source}$A $B{ends}'),
              'encdec': (f'{source}$A <|endoftext|>',
                         f'{source}$A <|endoftext|> $B <|endoftext|>')}
    wanted = [*tokenizer.source_ids, *tokenizer.encode('a')]            # of a text
    if arch in frames and (arch != 'gpt' or ends or engine.encode('a').ids != wanted):
        names = [{'id': text, 'ids': [i], 'tokens': [engine.id_to_token(i)]}
                 for text, i in special.items() if text in frames[arch][1]]
        engine.post_processor = optional('tokenizers').processors.TemplateProcessing(
            *frames[arch], names)
    more = {'gpt': {'padding_side': 'left'},  # so that the text follows the prompt
            'bert': {'model_input_names': ['input_ids', 'token_type_ids', 'attention_mask']}}
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', **more.get(arch, {})}
    for name, (key, *_) in ROLES.items():
        if token := engine.get_added_tokens_decoder().get(special.get(name)):  # else a word
            config[key] = token.content  # id_to_token may write its normalized form
    return {'tokenizer.json': json.loads(engine.to_str()), 'tokenizer_config.json': config}

# -----------------------------------------------------------------------------
# Flags. Each field of a dataclass is a flag: --max_iters 10, --max-iters=10, --bias, --no-bias.

BOUNDS = {'above': ('above', operator.gt), 'below': ('below', operator.lt),
          'low': ('at least', operator.ge), 'high': ('at most', operator.le)}
LIMITS = {int: {'low': 0, 'high': 2 ** 63 - 1}, float: {'low': 0}}  # unless a flag has its own

def flag(default, help, choices=(), **bounds):
    """A field of a dataclass, with its rules. default=None: it is derived, or missing."""
    rules = dict(help=help, choices=choices, **bounds)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=rules)
    return dataclasses.field(default=default, metadata=rules)

def check_flags(settings):
    """
    Raise ValueError for the first flag whose value breaks its rules. Values are converted to the
    type of their field: from Python they may be a Path or a number of numpy.
    """
    for f in dataclasses.fields(settings):
        value, rules = getattr(settings, f.name), f.metadata
        if value is None:
            continue
        value = f.type(value)
        setattr(settings, f.name, value)
        given, choices = f"--{f.name} {value}", rules['choices']
        require(value != '' or f.default == '', f"{given}is empty: give a value, or leave it out")
        require(not choices or not value or value in choices,
                f"{given}: choose one of {', '.join(choices)}")
        require(not isinstance(value, float) or math.isfinite(value), f"{given}: must be finite")
        limits = LIMITS.get(f.type, {}) | rules
        for bound, (words, holds) in BOUNDS.items():
            if bound in limits:
                require(holds(value, limits[bound]), f"{given}: must be {words} {limits[bound]}")

def boolean(text):
    """'False' -> False, where bool('False') is True. Raises ValueError at any other word."""
    if text.lower() not in ('true', 'false'):
        raise ValueError
    return text.lower() == 'true'

def normalize_flag(word):
    """--max-iters=10 -> --max_iters=10, --no-compile -> --compile=False; no change to others."""
    name, equals, value = word.partition('=')
    if re.fullmatch(r'--[a-z][\w-]*', name):
        if value.startswith('~/'):  # shells do not expand it after =
            value = os.path.expanduser(value)
        word = f"--{name[2:].replace('-', '_')}{equals}{value}"
    return re.sub(r'^--no_(\w+)\Z', r'--\1=False', word)

class Parser(argparse.ArgumentParser):  # raises where argparse ends the program
    def error(self, message):
        raise ValueError(message.removeprefix('argument '))

def read_flags(argv, description, groups):
    """
    argv -> {name: value} of the flags that were given. groups: {title in --help: dataclass}. Flags
    that only --config FILE.toml gives are added. Raises ValueError or OSError.
    """
    parser = Parser(description=description, usage='%(prog)s [--flag value ...]',
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    kinds, options = {}, {bool: dict(type=boolean, nargs='?', const=True),
                          list: dict(nargs='+', action='extend')}
    for title, cls in groups.items():
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(cls):
            kind, about = f.type, f.metadata['help']
            if f.metadata['choices']:
                about += ': ' + ' | '.join(f.metadata['choices'])
            if f.default not in (None, '', dataclasses.MISSING):
                about += f' [{f.default}]'
            kinds[f'--{f.name}'] = kind
            group.add_argument(f'--{f.name}', help=about.replace('%', '%%'), metavar=kind.__name__,
                               **options.get(kind, dict(type=kind)))

    def parse(words):
        given, extra = parser.parse_known_args(map(normalize_flag, words))
        if extra:
            near = difflib.get_close_matches(extra[0].partition('=')[0], kinds, 1, 0.76)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise ValueError(f"{extra[0]} belongs to no flag: {hint}")
        return vars(given)

    given = parse(argv)
    if not given.get('config'):
        return given
    try:
        values = tomllib.loads(Path(given['config']).read_text(encoding='utf-8-sig'))
        if given.get('eval_only'):  # score out_dir, not the model that the run began with
            values.pop('init_from', None)
        preset = values.get('preset')
        require('arch' not in values or not preset or given.get('preset', preset) == preset,
                f"it has all choices of {preset}: leave --preset out")
        words = []
        for name, found in values.items():
            several = isinstance(found, list) and kinds.get(f'--{name}') is list
            words += [f'--{name}={value}' for value in (found if several else [found])]
        return parse(words) | given
    except ValueError as e:
        raise ValueError(f"--config {given['config']}: {e}") from None

def write_config(values):
    """{name: value} as TOML that --config reads. None, which stands for derived, is left out."""
    return ''.join(f'{name} = {json.dumps(value, ensure_ascii=False)}\n'
                   for name, value in values.items() if value is not None)

def shell_word(name):
    """A name as shells read it, in double quotes if need be: Windows knows no others."""
    return name if re.fullmatch(r'[\w./\\:-]+', name) else f'"{name}"'

# -----------------------------------------------------------------------------
# Errors in one line, and signals

def mute_stdout():
    """After a broken pipe: what is printed from now on is lost, without an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

# the signals that end a program, as far as the system has them: Windows has no SIGHUP
STOPS = [stop for stop in signal.Signals if stop.name in ('SIGINT', 'SIGTERM', 'SIGHUP')]

def run(main):
    """Call main(argv). An error that the user can fix is one line, exit status 2, no traceback."""
    gc.freeze()  # looking for garbage in what was imported, such as torch, takes 0.4 s a run
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # neither closed nor a notebook's
            stream.reconfigure(encoding='utf-8', errors='replace')  # Windows has other defaults
    for number in STOPS:
        if signal.getsignal(number) == signal.SIG_DFL:  # not Ctrl-C, nor what nohup ignores
            signal.signal(number, lambda number, frame: sys.exit(128 + number))  # clean up, end
    try:
        main(sys.argv[1:])
        print(end='', flush=True)  # sys.stdout.flush(), where it is not closed
    except BrokenPipeError:  # as in `python sample.py | head`
        mute_stdout()
    except (ValueError, OSError, MemoryError, RuntimeError, IndexError) as e:
        if sys.flags.dev_mode:  # python -X dev train.py shows where it happened
            raise
        progress('')
        message = ' '.join(str(e).split())
        if isinstance(e, OSError) and e.strerror:
            message = (f"{e.filename}: {e.strerror}: choose another file or folder" if e.filename
                       else f"{e.strerror}: make room, or choose another folder")
        elif 'out of range in self' in message:  # how an embedding says so
            message = ("the tokenizer has a token for which the model has no row: add one to the "
                       "model (resize_token_embeddings)")
        elif isinstance(e, (MemoryError, RuntimeError, IndexError)):
            too_little = '(?i)(to|not) allocate|out of memory|alloc_failed|new thread'
            if message and not re.search(too_little, message):
                raise
            message = ("not enough memory: lower --batch_size (raise --gradient_accumulation_steps "
                       "in its place), --block_size, --n_embd, --num_samples or "
                       "--max_new_tokens")
        with contextlib.suppress(OSError):  # the terminal is closed
            to_stderr(f"{os.path.basename(sys.argv[0])}: error: {message}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

# -----------------------------------------------------------------------------
# The script

BPE_SAMPLE = 5_000_000  # bpe learns from about so many characters, in pieces all over a text

@dataclasses.dataclass
class Settings:
    """The flags of this script."""
    dataset: str = flag('', 'built in; py*, recall and numbers need no network', DATASETS)
    input: list = flag([], 'files, folders: UTF-8 text, .jsonl with a "text" a row, rows of a task')
    val: list = flag([], 'files to validate on, instead of a share of --input')
    task: str = flag('', 'what the data is for: lm to pre-train, the others to fine-tune '
                         '[lm, or that of the data set]', ('lm', *TASKS))
    tokenizer: str = flag('bpe', 'char | byte | bpe | gpt2 | a data, out or Hugging Face folder '
                                 'whose tokenizer is to be used')
    vocab_size: int = flag(4096, 'of bpe: all tokens, special ones included', low=1)
    val_fraction: float = flag(0.1, 'share to validate: the end of a text; random rows of a task',
                               above=0, below=1)
    block_size: int = flag(64, 'of a task: longest example, in tokens; longer ones are cut, split '
                               'or refused', low=8)
    out_dir: str = flag('', 'folder to write, data/NAME if not given')
    show: str = flag('', 'only show how text becomes tokens; bpe: of --out_dir, --dataset or pydoc')
    mirror: str = flag('', f'URL or folder to download from, instead of {UPSTREAM}')
    config: str = flag('', 'a TOML file of flags; those of the command line count more')

def choose_tokenizer(settings, characters, texts):
    """The tokenizer of the flags: the tokens of char are `characters`, bpe learns from `texts`."""
    name = settings.tokenizer
    makers = {'char': lambda: char_tokenizer(characters), 'byte': byte_tokenizer,
              'bpe': lambda: bpe_tokenizer(texts, settings.vocab_size), 'gpt2': gpt2_tokenizer}
    if name in makers:
        return makers[name]()
    folder = name if os.path.isdir(name) else f'data/{name}'
    require(os.path.isdir(folder), f"--tokenizer {name}: there is no {folder}: choose char, byte, "
            "bpe, gpt2, a Hugging Face folder, or run python prepare_data.py --dataset pydoc")
    if not {'ckpt.pt', 'best.pt'}.isdisjoint(os.listdir(folder)):  # of a run, without its data
        import sample  # only here: torch takes a second or two
        return sample.open_model(folder)[2]
    tokenizer = load_tokenizer(folder)
    require(tokenizer.end_id < tokenizer.n_vocab,
            f"--tokenizer {name}: no token ends a text: it needs an eos_token")
    return tokenizer

def note_unknown(tokenizer, split, ids):
    """Warn where the tokenizer of another model has no tokens for parts of the text."""
    lost = 0
    if tokenizer.unknown is not None:  # in parts: there may be more ids than fit into memory
        for part in np.array_split(ids, 1 + len(ids) // 10 ** 7):
            lost += np.count_nonzero(part == tokenizer.unknown)
    if lost:
        print(f"{split}: {lost:,} of {len(ids):,} tokens are unknown to the tokenizer, which loses "
              "their text: choose another --tokenizer")

def prepare_text(settings, task, folder, files, val_files):
    """Text -> the files to pre-train on. Returns the tokenizer, and what meta.json says of them."""
    size, characters, both, inside = 0, set(), files + val_files, 0
    rows = [path for path in files if path.lower().endswith(('.tsv', '.csv', '.conll'))]
    if rows:
        print(f"{some_of(rows)} is read as plain text: labelled rows need --task")
    for paths in (files, val_files):
        cut = size  # after the loop: the size of `files`, after which val_files begin
        for text in read_pieces(paths):
            size += len(text)
            characters.update(text)
            inside += text.count('<|endoftext|>')
            progress(f"reading: {size / 1e6:,.1f} M characters")
    if inside:
        print(f"{inside:,} <|endoftext|> do not stand alone on a line: there they are only text")
    require(size, f"{files[0]} is empty: add text")
    if not val_files:
        cut = int(size * (1 - settings.val_fraction))  # train: the text before it, val: after
    texts = filter(None, part(read_pieces(files), 0, cut))
    # a share of the pieces, at no fixed distance, since a text may have a rhythm of its own
    texts = (text for i, text in enumerate(texts) if i * 0.6180339887 % 1 * cut < BPE_SAMPLE)
    tokenizer = choose_tokenizer(settings, characters, texts)
    dtype = 'uint16' if tokenizer.n_vocab <= 2 ** 16 else 'uint32'
    counts = {}
    for split, begin, end in (('train', 0, cut), ('val', cut, size)):
        counts[split] = write_ids(folder / f'{split}.bin', dtype, tokenizer,
                                  part(read_pieces(both), begin, end))
        progress('')
        require(counts[split]['tokens'] > 1, f"{some_of(both)}: too short for a {split} split: "
                "add text, change --val_fraction, or give --val FILE")
        note_unknown(tokenizer, split, np.memmap(folder / f'{split}.bin', dtype, mode='r'))
    return tokenizer, {'dtype': dtype, 'counts': counts, 'labels': []}

def check_labels(task, rows, labels, path):
    """Raise ValueError for fewer than two labels, and for those of a wrong column or a header."""
    most = math.inf
    if task == 'classify':  # a label that is a text or a measurement is in the wrong column
        last_column = {row.get('text_b', row['text']) for row in rows}
        measured = any(re.fullmatch(r'-?\d+\.\d+', label) for label in labels)
        most = 10 if measured else max(10, min(len(last_column), len(rows) // 2))
    require(1 < len(labels) <= most, f"{path}: {len(rows)} rows have {len(labels)} different "
            f"labels: {some_of([label[:40] for label in labels])}: there must be two or more, each "
            "in several rows (to classify: in the first column, and no measurements)")
    if task == 'classify' and len(rows) > 2 * len(labels):  # is line 1 a header, not a label?
        inside = {row['label'] for row in rows if not row['where'].endswith(', line 1')}
        for row in rows:
            require(not inside or row['label'] in inside,
                    f"{row['where']}: the label {row['label']!r} is nowhere else: leave it out")

def prepare_task(settings, task, folder, files, val_files):
    """Labelled rows -> the files to fine-tune on. Returns what prepare_text returns."""
    spec = TASKS[task]
    rows, val_rows = ([row for path in paths for row in spec.read(path)]
                      for paths in (files, val_files))
    splits = (rows, val_rows) if val_files else split_rows(rows, settings.val_fraction)
    n_train, n_val = map(len, splits)
    require(n_train and n_val, f"{some_of(files + val_files)}: {n_train} rows to train on, {n_val} "
            "to validate: add rows or contexts, change --val_fraction, or give --val FILE")
    labels = spec.label_names({label for row in rows for label in spec.labels_of(row)})
    if task in ('classify', 'tag'):
        check_labels(task, rows, labels, files[0])
    train_texts, val_texts = ([text for row in split for text in texts_of(row)] for split in splits)
    characters, learned = {*''.join(train_texts + val_texts)}, dict.fromkeys(train_texts)
    if task in WITH_OFFSETS:
        learned = itertools.chain(*map(split_cjk, learned))
    tokenizer, counts = choose_tokenizer(settings, characters, learned), {}
    for split, chosen, texts in zip(('train', 'val'), splits, (train_texts, val_texts)):
        examples = encode_rows(tokenizer, task, chosen, labels, settings.block_size)
        ids = [example['ids'] + example.get('decoder_ids', []) for example in examples]
        note_unknown(tokenizer, split, np.concatenate(ids))
        sizes = [*map(len, ids)]
        counts[split] = {'tokens': sum(sizes), 'rows': len(chosen), 'examples': len(examples),
                         'bytes': len(''.join(texts).encode())}
        text = ''.join(f'{json.dumps(example, ensure_ascii=False)}\n' for example in examples)
        (folder / f'{split}.jsonl').write_bytes(text.encode())
        if task == 'classify' and settings.block_size in sizes:
            print(f"{split}: {sizes.count(settings.block_size):,} examples fill --block_size "
                  f"{settings.block_size}: their texts may be cut")
        long = [e for e in examples if task == 'qa' and e['targets'][1] - e['targets'][0] >= 30]
        if long:
            print(f"{split}: {len(long):,} examples have an answer of over 30 tokens, which "
                  "sample.py never gives")
    same = set.intersection(*({str(row | {'where': ''}) for row in split} for split in splits))
    if same:
        print(f"{len(same):,} different rows are both in train and in val: its scores may mislead")
    return tokenizer, {'counts': counts, 'labels': labels, 'block_size': settings.block_size}

def prepare(settings):
    """Make the data folder of the flags. Returns its path and meta; raises ValueError, OSError."""
    check_flags(settings)
    name, files, val_files = settings.dataset, settings.input, settings.val
    require(bool(name) != bool(files),
            "give either --input PATH or --dataset NAME, for a first try pydoc")
    usual, make = DATASETS.get(name, ('lm', None))
    task = settings.task or usual
    require(not name or task == usual, f"--task {task}: {name} is for {usual}: leave it out")
    out_dir = settings.out_dir or f'data/{name or Path(os.path.abspath(files[0])).stem}'
    with new_folder(out_dir) as folder:
        if make:
            paths = [folder / 'source.txt', folder / 'source.val.txt']
            texts = make(*download(name, settings.mirror))
            for path, text in zip(paths, texts):
                path.write_bytes(text.encode())
            files, val_files = paths[:1], val_files or paths[1:len(texts)]
        files, val_files = find_files(files), find_files(val_files)
        target = Path(out_dir).resolve()
        for path in files + val_files:
            require(target not in Path(path).resolve().parents, f"--out_dir {out_dir} holds the "
                    "input, which would be lost: choose another name")
        if val_files:  # leave copies of them out of files, unless nothing is left
            held_out = {sha256_of([path]) for path in val_files}
            files = [path for path in files if sha256_of([path]) not in held_out] or files
        prepare_files = prepare_text if task == 'lm' else prepare_task
        tokenizer, made = prepare_files(settings, task, folder, files, val_files)
        meta = {'format': 'plainformer data 2', 'task': task, 'tokenizer': tokenizer.name,
                'vocab_size': tokenizer.n_vocab, **made,
                'source': name or [*map(str, settings.input)],
                'sha256': sha256_of(files + val_files)}
        write_json(folder / 'tokenizer.json', tokenizer.to_dict())
        write_json(folder / 'meta.json', meta)
    return out_dir, meta

def main(argv):
    settings = Settings(**read_flags(argv, __doc__, {'flags': Settings}))
    if settings.show:
        if settings.tokenizer == 'bpe':  # learned before, from a data set
            settings.tokenizer = settings.out_dir or settings.dataset or 'pydoc'
        tokenizer = choose_tokenizer(settings, {*settings.show}, [])
        return print(*explain(tokenizer, settings.show), sep='\n')
    out_dir, meta = prepare(settings)
    for split, counts in meta['counts'].items():
        parts = [f'{n:,} {name[:-1] if n == 1 else name}'
                 for name, n in counts.items() if name != 'bytes']
        print(f"{split + ':':6} {', '.join(parts)}")
    if meta['labels']:
        print(f"labels: {some_of(meta['labels'])}")
    name = shell_word(out_dir.removeprefix('data/'))
    print(f"{out_dir}: {meta['tokenizer']} tokenizer, vocabulary of {meta['vocab_size']:,}. "
          f"Next: python train.py --dataset {name}")

if __name__ == '__main__':
    run(main)
