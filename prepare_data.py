"""
From text to numbers. A data set becomes a folder of plain files, which train.py reads:

    data/NAME/meta.json             what it is: task, vocabulary, counts, labels, source, sha256
    data/NAME/tokenizer.json        how text becomes ids and back
    data/NAME/train.bin, val.bin    to pre-train on: one long row of ids (uint16 or uint32), in
                                    which every document ends with <|endoftext|>
    data/NAME/train.jsonl, val.jsonl    to fine-tune on: one example a line, whose keys are the
                                    arguments of model.forward()

    python prepare_data.py --dataset pydoc                       Python's documentation, offline
    python prepare_data.py --input book.txt notes/               text files, folders, JSON lines
    python prepare_data.py --task classify --input reviews.tsv   label<TAB>text[<TAB>second text]
    python prepare_data.py --task tag --input entities.conll     a token and its tag a line
    python prepare_data.py --task qa --input squad.json          questions, answered in a context
    python prepare_data.py --task seq2seq --input en-de.tsv      source<TAB>target
    python prepare_data.py --show "The import statement"         how a text becomes tokens

This is the first script that a user runs, so what all scripts share stands here too: flags, errors
of one line, the progress line.

    [1] Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword Units,
        https://arxiv.org/abs/1508.07909
    [2] Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2)
    [3] Devlin et al. 2018, BERT, https://arxiv.org/abs/1810.04805
    [4] Rajpurkar et al. 2016, SQuAD, https://arxiv.org/abs/1606.05250
"""

import argparse
import ast
import base64
import collections
import contextlib
import dataclasses
import difflib
import functools
import glob
import gzip
import hashlib
import heapq
import http.client
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
import string
import sys
import tempfile
import tokenize
import tomllib
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import tiktoken

# -----------------------------------------------------------------------------
# Flags. Every field of a dataclass is a flag of a script: --max_iters 10, --max-iters=10.

BOUNDS = {'low': ('at least', operator.ge), 'high': ('at most', operator.le),
          'above': ('above', operator.gt), 'below': ('below', operator.lt)}
KINDS = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'a text',
         list: 'a list'}

def flag(default, help, choices=(), low=None, high=None, above=None, below=None, kind=None):
    """
    A field that describes itself. `low` and `high` are allowed values, `above` and `below` are
    not. `kind` is its type, given where the default is None: a value that is derived or missing.
    """
    rules = dict(help=help, choices=choices, low=low, high=high, above=above, below=below,
                 kind=kind or type(default))
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=rules)
    return dataclasses.field(default=default, metadata=rules)

def check_flags(settings):
    """Raise ValueError for the first field of a dataclass of flags whose value breaks its rules."""
    for f in dataclasses.fields(settings):
        value, rules = getattr(settings, f.name), f.metadata
        kind, choices = rules['kind'], rules['choices']
        if value is None and f.default is None:
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"--{f.name} {value!r}: must be {KINDS[kind]}")
        if choices and value not in choices:
            known = ', '.join(filter(None, choices))
            raise ValueError(f"--{f.name} {value}: choose one of {known}")
        if kind is float and not abs(value) < math.inf:
            raise ValueError(f"--{f.name} {value}: must be finite")
        for bound, (words, holds) in BOUNDS.items():
            if rules[bound] is not None and not holds(value, rules[bound]):
                raise ValueError(f"--{f.name} {value}: must be {words} {rules[bound]}")

def parse_value(kind, text):
    """The text of a flag as a value of its kind."""
    booleans = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}
    try:
        return booleans[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text} is not {KINDS[kind]}") from None

def normalize_flag(word, kinds):
    """--max-iters=10 -> --max_iters=10, --no-compile -> --compile=False; no change to others."""
    name, equals, value = word.partition('=')
    if not name.startswith('--') or name == '--help':
        return word
    plain = name[2:].replace('-', '_')
    if plain in kinds:
        return f'--{plain}{equals}{value}'
    positive = plain.removeprefix('no_')
    if kinds.get(positive) is bool and not equals:
        return f'--{positive}=False'
    near = difflib.get_close_matches(plain, kinds, n=1)
    hint = f"did you mean --{near[0]}?" if near else "see --help"
    raise ValueError(f"unknown flag {name}: {hint}")

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message.removeprefix('argument '))

def read_flags(argv, description, groups):
    """
    argv -> {name: value} of the flags that were given; groups: {title of the help: dataclass}. The
    values of a file --config FILE.toml count too, less than those of argv. Raises ValueError.
    """
    parser = Parser(description=description, usage='%(prog)s [--flag value ...]',
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    kinds, many = {}, {bool: dict(nargs='?', const=True), list: dict(nargs='+', action='extend')}
    for title, cls in groups.items():
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(cls):
            kind = kinds[f.name] = f.metadata.get('kind', type(f.default))
            about = f.metadata['help']
            if f.metadata['choices']:
                about += ': ' + ' | '.join(filter(None, f.metadata['choices']))
            if f.default not in (None, '', dataclasses.MISSING):
                about += f' [{f.default}]'
            group.add_argument(f'--{f.name}', help=about.replace('%', '%%'), metavar=kind.__name__,
                               type=functools.partial(parse_value, str if kind is list else kind),
                               **many.get(kind, {}))

    def parse(words):
        given, extra = parser.parse_known_args([normalize_flag(word, kinds) for word in words])
        if extra:
            raise ValueError(f"{extra[0]} belongs to no flag: see --help")
        return vars(given)

    given = parse(argv)
    path = given.get('config')
    if not path:
        return given
    try:
        values = tomllib.loads(Path(path).read_text(encoding='utf-8'))
        return parse([f'--{name}={value}' for name, value in values.items()]) | given
    except ValueError as e:
        raise ValueError(f"--config {path}: {e}") from None

def write_config(values, notes=()):
    """{name: value} as TOML that --config reads. None, which stands for derived, is left out."""
    lines = [f'# {note}\n' for note in notes]
    for name, value in values.items():
        if value is not None:
            lines.append(f'{name} = {json.dumps(value, ensure_ascii=False)}\n')
    return ''.join(lines)

def run(main):
    """Call main(argv). An error that the user can mend is one line, exit status 2, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding='utf-8', errors='replace')  # Windows has other defaults
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # clean up, end
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # as in `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError) as e:
        progress('')
        message = ' '.join(str(e).split()) or "not enough memory"
        sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {message}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

def progress(text):
    """The live line of long work, on a terminal only. An empty text clears it."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print('\r' + text[:width] + '\x1b[K', end='', file=sys.stderr, flush=True)

# -----------------------------------------------------------------------------
# Tokenizers: how text becomes ids and back

SPECIALS = ['<|endoftext|>', '[PAD]', '[CLS]', '[SEP]', '[MASK]',
            *(f'<extra_{i}>' for i in range(100))]
ONE = r'(?s:.)'  # each character is a piece
# letters, digits, or other signs, each with one space before it; then other white space
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CJK = regex.compile(r'[\p{Han}\p{Hiragana}\p{Katakana}]')  # no spaces: each character is a word
FORMAT = 'plainformer tokenizer 2'

# Where a long text may be cut, so that no token would cross the cut: at the end of a line, before a
# line that begins with something solid; else before a space. (?r) searches from the end.
CUTS = [regex.compile(pattern) for pattern in (r'(?r)(?<=\S\n)(?=\S)|(?<=\n)(?=\n\S)',
                                               r'(?r)(?<=\S)(?= \S)')]
SHORT = 100_000  # characters to encode at once: tiktoken fails at a million blanks in a row

def safe_pieces(texts, size):
    """
    Join texts and cut them again, into pieces of about `size` characters that no token crosses. A
    text without such places is cut anywhere, into pieces that are twice as long.
    """
    rest = ''
    for text in texts:
        rest += text
        cuts = [pattern.search(rest) for pattern in CUTS] if len(rest) >= size else []
        cut = next((match.start() for match in cuts if match), 0)
        if not cut and len(rest) >= 2 * size:
            cut = len(rest)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    yield rest

def short_pieces(text):
    """A text in pieces of about SHORT characters."""
    return safe_pieces((text[i:i + SHORT] for i in range(0, len(text), SHORT)), SHORT)

class Tokenizer:
    """
    A pattern cuts text into pieces, and a table {bytes: id} says which bytes of a piece are one
    token. char, byte, bpe and gpt2 differ in pattern and table only. Special tokens, such as
    <|endoftext|> and [MASK], have ids of their own: where a text says [MASK], it is text.
    """

    def __init__(self, name, pattern, ranks, special=()):
        """special {text: id}: those that it lacks get the ids behind all others."""
        self.name, self.pattern, self.ranks, self.special = name, pattern, ranks, dict(special)
        for text in SPECIALS:
            self.special.setdefault(text, len(ranks) + len(self.special))
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=self.special)
        self.n_vocab = self.encoding.n_vocab
        self.end_ids = [self.special['<|endoftext|>']]

    def id(self, text):
        """The id of a special token, by its name here."""
        if text not in self.special:
            raise ValueError(f"the tokenizer ({self.name}) has no token {text}: choose another")
        return self.special[text]

    @property
    def end_id(self):
        return self.end_ids[0]

    @property
    def pad_id(self):
        return self.special['[PAD]']

    @property
    def start_id(self):
        """What the target of a decoder begins with."""
        return self.special.get('<|start|>', self.end_id)

    def encode(self, text):
        """text -> uint32 ids (T,). Raises ValueError where it cannot be written in tokens."""
        if self.name == 'char':
            unknown = [c for c in set(text) if c.encode(errors='replace') not in self.ranks]
            if unknown:
                at = min(map(text.index, unknown))
                raise ValueError(f"the tokenizer has never seen {text[at]!r} (character {at + 1} "
                                 f"of {text[:at + 20]!r}): it knows the characters of its text")
        try:
            ids = [self.encoding.encode_to_numpy(piece, disallowed_special=())
                   for piece in short_pieces(text)]
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
            raise ValueError(f"this is not valid Unicode text: {text[:40]!r}") from None
        return np.concatenate(ids)

    def encode_batch(self, texts):
        """The ids of many texts, on all cores: tiktoken releases Python's lock."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.encode, texts))

    def encode_with_offsets(self, text):
        """
        text -> ids (T,) and offsets (T, 2): text[a:b] holds all characters that a token has a part
        of. No token crosses the border of a CJK character: entities and answers begin there.
        """
        pieces = regex.split(f'({CJK.pattern})', text)
        ids = np.concatenate([self.encode(piece) for piece in pieces])
        ends = np.cumsum([0, *(len(self.token_bytes(i)) for i in ids.tolist())])
        is_first = np.frombuffer(text.encode(), np.uint8) & 0xC0 != 0x80  # others are 10xxxxxx
        character = np.cumsum(is_first) - 1  # of each byte
        return ids, np.stack([character[ends[:-1]], character[ends[1:] - 1] + 1], axis=1)

    def decode(self, ids):
        return self.encoding.decode([int(i) for i in ids])

    def token_bytes(self, i):
        """What one token adds to a text."""
        return self.encoding.decode_single_token_bytes(i)

    def text_of(self, i):
        """The name of a special token."""
        return next(text for text, j in self.special.items() if i == j)

    def to_dict(self):
        """Plain data, for JSON and checkpoints."""
        tokens = sorted(self.ranks, key=self.ranks.get)
        return {'format': FORMAT, 'name': self.name, 'pattern': self.pattern,
                'special': self.special,
                'tokens': [base64.b64encode(token).decode() for token in tokens]}

    @staticmethod
    def from_dict(saved):
        if saved.get('format') != FORMAT:
            raise ValueError(f"this is no tokenizer of this version: its format is not {FORMAT!r}")
        try:
            if saved['name'] == HFTokenizer.name:
                engine = import_tokenizers().Tokenizer.from_str(saved['engine'])
                return HFTokenizer(engine, saved['special'], saved['end_ids'])
            ranks = {base64.b64decode(token): i for i, token in enumerate(saved['tokens'])}
            return Tokenizer(saved['name'], saved['pattern'], ranks, saved['special'])
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"the tokenizer is damaged ({e!r}): prepare the data again") from None

    def hf_engine(self, special):
        """The same as a tokenizer of the package `tokenizers`."""
        if self.name == 'char':
            raise ValueError("the tokenizer char has no counterpart in transformers: prepare the "
                             "data with --tokenizer bpe or byte")
        hf = import_tokenizers()
        engine = hf.Tokenizer(hf.models.BPE(*vocab_and_merges(self.ranks)))
        engine.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                           use_regex=self.name != 'byte')
        engine.decoder = hf.decoders.ByteLevel()
        engine.add_special_tokens(sorted(special, key=special.get))
        return engine

    def export_files(self, vocab_size):
        """{file name: data} for transformers, with the special tokens below vocab_size."""
        special = {text: i for text, i in self.special.items() if i < vocab_size}
        config = {'tokenizer_class': 'PreTrainedTokenizerFast'}
        for key, name in {'eos_token': '<|endoftext|>', 'bos_token': '<|start|>',
                          'pad_token': '[PAD]', 'cls_token': '[CLS]', 'sep_token': '[SEP]',
                          'mask_token': '[MASK]'}.items():
            if name in special:
                config[key] = self.text_of(special[name])
        return {'tokenizer.json': json.loads(self.hf_engine(special).to_str()),
                'tokenizer_config.json': config}

def char_tokenizer(characters):
    """One token for each character of the text."""
    return Tokenizer('char', ONE, {c.encode(): i for i, c in enumerate(sorted(characters))})

def byte_tokenizer():
    """256 tokens, which can write any text."""
    return Tokenizer('byte', ONE, {bytes([b]): b for b in range(256)})

def gpt2_tokenizer():
    """That of GPT-2, with our special tokens behind its own 50,257."""
    try:
        base = tiktoken.get_encoding('gpt2')
    except Exception as e:  # whatever the network raises
        raise ValueError(f"the gpt2 tokenizer could not be downloaded ({type(e).__name__}): go "
                         "online once, or set TIKTOKEN_CACHE_DIR to a folder that has it, or use "
                         "--tokenizer bpe") from None
    return Tokenizer('gpt2', base._pat_str, base._mergeable_ranks, base._special_tokens)

def count_pairs(tokens):
    """
    How often each pair of neighbours occurs.

    >>> dict(count_pairs([1, 2, 3, 1, 2]))
    {(1, 2): 2, (2, 3): 1, (3, 1): 1}
    """
    return collections.Counter(itertools.pairwise(tokens))

def merge(tokens, pair, new):
    """
    Put the token `new` in place of each pair, from left to right.

    >>> merge([1, 2, 3, 1, 2], (1, 2), 4)
    [4, 3, 4]
    """
    merged, i = [], 0
    while i < len(tokens):
        if tokens[i] == pair[0] and tokens[i + 1:i + 2] == [pair[1]]:
            merged.append(new)
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged

def train_bpe(piece_counts, n_tokens):
    """
    Byte-pair encoding [1] over bytes [2]: start from the 256 bytes, and again and again merge the
    pair of neighbours that occurs most often; of equals, that whose bytes come first. No merge
    crosses the pieces that the pattern cuts. {piece: how often} -> {bytes: id} of at most n_tokens
    tokens; it ends early where no pair occurs twice.

    Counting all pairs again before each merge would do, slowly. Here each distinct piece is stored
    once, and a merge touches only the pieces that hold the pair: the pairs of such a piece are
    taken off the counts, the piece is merged, and its new pairs are put back.
    """
    tokens = [bytes([b]) for b in range(256)]
    pieces, weights = [list(piece.encode()) for piece in piece_counts], [*piece_counts.values()]
    counts = collections.defaultdict(int)   # pair -> how often it occurs
    holders = collections.defaultdict(set)  # pair -> the numbers of the pieces that hold it
    for i, piece in enumerate(pieces):
        for pair, n in count_pairs(piece).items():
            counts[pair] += n * weights[i]
            holders[pair].add(i)

    # A heap has the commonest pair on top. Counts change after a pair was pushed: one that comes
    # up with an old count is pushed again with the new one.
    entry = lambda pair: (-counts[pair], tokens[pair[0]], tokens[pair[1]], pair)
    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    while len(tokens) < n_tokens and heap:
        count, _, _, pair = heapq.heappop(heap)
        if counts[pair] < 2:
            continue
        if counts[pair] != -count:
            heapq.heappush(heap, entry(pair))
            continue
        new, changed = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for i in holders.pop(pair):
            piece, weight = pieces[i], weights[i]
            for p in zip(piece, piece[1:]):
                counts[p] -= weight
            pieces[i] = piece = merge(piece, pair, new)
            for p in zip(piece, piece[1:]):
                counts[p] += weight
                if new in p:
                    changed.add(p)
                    holders[p].add(i)
        for p in changed:
            heapq.heappush(heap, entry(p))
        progress(f"learning tokens: {new:,} of {n_tokens:,}")
    progress('')
    unique = dict.fromkeys(tokens)  # two pairs may give the same bytes: one token
    return {token: i for i, token in enumerate(unique)}

def bpe_tokenizer(texts, vocab_size):
    """A byte-level BPE learned from texts. vocab_size counts the special tokens too."""
    n_tokens = vocab_size - len(SPECIALS)
    if n_tokens < 256:
        raise ValueError(f"--vocab_size {vocab_size}: a bpe vocabulary has 256 bytes and "
                         f"{len(SPECIALS)} special tokens: choose at least {256 + len(SPECIALS)}")
    counts, pattern = collections.Counter(), regex.compile(WORDS)
    for text in texts:
        for piece in short_pieces(text):
            counts.update(pattern.findall(piece))
    return Tokenizer('bpe', WORDS, train_bpe(counts, n_tokens))

def next_merge(ranks, parts):
    """
    (rank, i): parts[i] and parts[i + 1] are merged next, the neighbours whose union was learned
    first. The rank is infinite where no two of them make a token.

    >>> next_merge({b'a': 0, b'b': 1, b'c': 2, b'bc': 3, b'ab': 4}, [b'a', b'b', b'c'])
    (3, 1)
    """
    pairs = enumerate(itertools.pairwise(parts))
    return min(((ranks.get(a + b, math.inf), i) for i, (a, b) in pairs), default=(math.inf, 0))

def explain(tokenizer, text):
    """How a text becomes tokens, as lines: the pieces, and in each the merges in their order."""
    ids = tokenizer.encode(text).tolist()
    for piece in regex.findall(WORDS, text) if tokenizer.name in ('bpe', 'gpt2') else []:
        parts, rank, why = [bytes([b]) for b in piece.encode()], 0, 'bytes'
        yield render_bytes(piece.encode())
        while rank < math.inf:
            yield f"    {' '.join(map(render_bytes, parts)):<40} {why}"
            rank, i = next_merge(tokenizer.ranks, parts)
            why = f"{' + '.join(map(render_bytes, parts[i:i + 2]))} = token {rank}"
            parts[i:i + 2] = [b''.join(parts[i:i + 2])]
    yield f"{len(ids):,} tokens: " + ', '.join(f'{render_token(tokenizer, i)} {i}' for i in ids)

SIGNS = str.maketrans({' ': '␣', '\n': '⏎', '\r': '␍', '\t': '⇥'})

def render_bytes(data):
    """Bytes to be seen: ␣ is a space, ⏎ a line end, ‹E6 98› less than a character."""
    as_hex = lambda match: f"‹{match[0].encode(errors='surrogateescape').hex(' ').upper()}›"
    text = data.decode(errors='surrogateescape').translate(SIGNS)
    text = re.sub('[\udc80-\udcff]+', as_hex, text)
    return ''.join(c if c.isprintable() else f'‹U+{ord(c):04X}›' for c in text)

def render_token(tokenizer, i):
    """A token to be seen."""
    if i in tokenizer.special.values():
        return tokenizer.text_of(i)
    return render_bytes(tokenizer.token_bytes(i))

# -----------------------------------------------------------------------------
# The tokenizers of other models, through the package `tokenizers`

# GPT-2's files write each byte as a visible character: most as themselves, others from U+0100 on.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(b): b for b in VISIBLE}
BYTE_OF |= {chr(256 + n): b for n, b in enumerate(sorted({*range(256)}.difference(VISIBLE)))}

def vocab_and_merges(ranks):
    """A table {bytes: id} as GPT-2's files have it: with the two tokens that each is merged of."""
    visible, merges = {b: c for c, b in BYTE_OF.items()}, []
    write = lambda token: ''.join(visible[b] for b in token)
    for token in sorted(ranks, key=ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # merge as an encoder would, until two are left
            _, i = next_merge(ranks, parts)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(map(write, parts)))
    return {write(token): i for token, i in ranks.items()}, merges

def import_tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise ValueError("this tokenizer needs one more package: pip install tokenizers") from None
    return tokenizers

class HFTokenizer(Tokenizer):
    """That of another model (WordPiece, SentencePiece, ...); engine is a tokenizers.Tokenizer."""
    name = 'huggingface'

    def __init__(self, engine, special, end_ids):
        engine.no_truncation()  # the file may hold both
        engine.no_padding()
        engine.encode_special_tokens = True  # where they are written in a text, they are text
        self.engine, self.special, self.end_ids = engine, special, end_ids
        self.n_vocab = 1 + max(engine.get_vocab().values())
        self.unknown = engine.token_to_id(getattr(engine.model, 'unk_token', None) or '<unk>')

    def encode_all(self, texts):
        """Yield the ids and offsets of each text."""
        try:
            encoded = self.engine.encode_batch(texts, add_special_tokens=False)
        except Exception as e:  # half of a surrogate pair, or a word that has no token
            raise ValueError(f"{texts[0][:40]!r} cannot be encoded: {e}") from None
        for text in encoded:
            ids = np.array(text.ids, np.uint32)
            if self.unknown is not None:  # SentencePiece finds its special tokens in a text
                ids[np.isin(ids, [*self.special.values()])] = self.unknown
            yield ids, np.array(text.offsets, np.int64).reshape(-1, 2)

    def encode_batch(self, texts):
        return [ids for ids, _ in self.encode_all(texts)]

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_with_offsets(self, text):
        return next(self.encode_all([text]))

    def decode(self, ids):
        return self.engine.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, i):
        """What one token adds to a text that goes on: a word of WordPiece, the space before it."""
        token, kind = self.engine.id_to_token(i) or '', type(self.engine.decoder).__name__
        if kind == 'ByteLevel':
            return b''.join(bytes([BYTE_OF[c]]) if c in BYTE_OF else c.encode() for c in token)
        if kind == 'WordPiece':
            return (token[2:] if token.startswith('##') else ' ' + token).encode()
        if re.fullmatch('<0x[0-9A-F]{2}>', token):
            return bytes.fromhex(token[3:5])
        return token.replace('\u2581', ' ').encode()

    def text_of(self, i):
        return self.engine.id_to_token(i)

    def to_dict(self):
        return {'format': FORMAT, 'name': self.name, 'special': self.special,
                'end_ids': self.end_ids, 'engine': self.engine.to_str()}

    def hf_engine(self, special):
        return self.engine

# Our special tokens, and what theirs may be: a key of tokenizer_config.json, or a text.
ROLES = {
    '<|endoftext|>': ('eos_token', '</s>', '<|endoftext|>', 'sep_token', '[SEP]'),
    '[PAD]': ('pad_token', '[PAD]', '<pad>'),
    '[CLS]': ('cls_token', '[CLS]', 'bos_token', '<s>', '<|begin_of_text|>'),
    '[SEP]': ('sep_token', '[SEP]', '</s>'),
    '[MASK]': ('mask_token', '[MASK]'),
    **{f'<extra_{i}>': (f'<extra_id_{i}>',) for i in range(100)},
}
# What tokenizer_config.json may say where no tokenizer.json describes the tokenizer.
UNDERSTOOD = {
    'tokenizer_class': ('BertTokenizer', 'DistilBertTokenizer', 'ElectraTokenizer',
                        'MobileBertTokenizer', 'GPT2Tokenizer', 'RobertaTokenizer'),
    'subword_tokenizer_type': ('wordpiece',), 'word_tokenizer_type': ('basic',),
    'do_subword_tokenize': (True,), 'do_word_tokenize': (True,), 'do_basic_tokenize': (True,),
}

def read_vocabulary(folder, config, added):
    """
    vocab.txt as WordPiece, or vocab.json and merges.txt as byte-level BPE, with added tokens
    {text: id} -> a tokenizers.Tokenizer.
    """
    for key, values in UNDERSTOOD.items():
        value = config.get(key)
        if value is not None and value not in values and str(value)[:-4] not in values:  # ...Fast
            raise ValueError(f"{folder}: {key}={value} is not supported here: save the tokenizer "
                             "as a tokenizer.json, or choose another model")
    hf, path = import_tokenizers(), functools.partial(os.path.join, folder)
    if os.path.exists(path('vocab.txt')):
        if not config:
            print(f"{folder} has no tokenizer_config.json: all letters become lower case, as in "
                  "transformers", file=sys.stderr)
        engine = hf.BertWordPieceTokenizer(
            path('vocab.txt'), lowercase=config.get('do_lower_case', True),
            strip_accents=config.get('strip_accents'),
            handle_chinese_chars=config.get('tokenize_chinese_chars', True))
    elif os.path.exists(path('vocab.json')) and os.path.exists(path('merges.txt')):
        vocab, merges = hf.models.BPE.read_file(path('vocab.json'), path('merges.txt'))
        engine = hf.ByteLevelBPETokenizer(
            vocab, merges, add_prefix_space=config.get('add_prefix_space', False))
    else:
        raise ValueError(f"{folder} has no tokenizer that can be read here: it needs "
                         "tokenizer.json, vocab.txt, or vocab.json with merges.txt")
    special = {value for key, value in config.items() if key.endswith('_token')}
    for text in sorted(added, key=added.get):
        add = engine.add_special_tokens if text in special else engine.add_tokens
        add([text])
        if engine.token_to_id(text) != added[text]:
            raise ValueError(f"{folder}: the added token {text!r} cannot have the id {added[text]}")
    return hf.Tokenizer.from_str(engine.to_str())

def open_huggingface(folder):
    """The tokenizer of a Hugging Face folder. Raises ValueError where it has none, or no end."""
    path = functools.partial(os.path.join, folder)
    read = lambda name: read_json(path(name)) if os.path.exists(path(name)) else {}
    config = read('special_tokens_map.json') | read('tokenizer_config.json')
    for key, value in config.items():
        if isinstance(value, dict) and 'content' in value:
            config[key] = value['content']
    if os.path.exists(path('tokenizer.json')):
        engine = import_tokenizers().Tokenizer.from_file(path('tokenizer.json'))
    else:
        added = config.get('added_tokens_decoder', {}).items()
        added = {token['content']: int(i) for i, token in added} | read('added_tokens.json')
        engine = read_vocabulary(folder, config, added)

    def find(*candidates):
        """The id of the first candidate that is a token, or None."""
        texts = [config.get(name, name) for name in candidates]
        return next((engine.token_to_id(text) for text in texts
                     if isinstance(text, str) and engine.token_to_id(text) is not None), None)

    ends = [find(*ROLES['<|endoftext|>'])]  # a text ends at each token that a file calls its end
    for name in ('generation_config.json', 'config.json'):
        found = read(name).get('eos_token_id')
        ends += found if isinstance(found, list) else [found]
    ends = [i for i in dict.fromkeys(ends) if i is not None and engine.id_to_token(i)]
    if not ends:
        raise ValueError(f"{folder}: its tokenizer has no token that ends a text: it needs a "
                         "tokenizer_config.json with an eos_token")
    special = dict.fromkeys(['<|endoftext|>', '[PAD]', '[CLS]', '[SEP]'], ends[0])
    for name, candidates in ROLES.items():
        found = find(*candidates)
        if found is not None:
            special[name] = found
    # What stands before a text: a Llama's tokenizer puts <s> there; T5's decoder begins with [PAD].
    start, begin = read('config.json').get('decoder_start_token_id'), find('bos_token', '<s>')
    if start is None and '<extra_0>' in special:
        start = special['[PAD]']
    if start is None and begin is not None and engine.encode('').ids[:1] == [begin]:
        start = begin
    if start is not None:
        special['<|start|>'] = start
    for i, token in engine.get_added_tokens_decoder().items():
        if token.special and i not in special.values():
            special[f'{token.content} {i}' if token.content in special else token.content] = i
    return HFTokenizer(engine, special, ends)

def load_tokenizer(folder):
    """The tokenizer of a data folder, or of a Hugging Face folder. Raises ValueError or OSError."""
    files = {'tokenizer.json', 'vocab.txt', 'vocab.json', 'tokenizer.model'} & {*os.listdir(folder)}
    if not files:
        raise FileNotFoundError(f"{folder} has no tokenizer.json: give a folder that "
                                "prepare_data.py made")
    if 'tokenizer.json' in files:
        saved = read_json(os.path.join(folder, 'tokenizer.json'))
        if 'format' in saved:
            return Tokenizer.from_dict(saved)
    try:
        return open_huggingface(folder)
    except (ValueError, OSError, KeyboardInterrupt):
        raise
    except BaseException as e:  # the file may be damaged, and what panics in Rust is no Exception
        raise ValueError(f"{folder}: its tokenizer cannot be read ({type(e).__name__}: "
                         f"{str(e)[:80]}): fetch its files again") from None

# -----------------------------------------------------------------------------
# Text from files, a piece at a time: memory does not grow with the corpus

PIECE = 1 << 22                                        # characters that are read at once
MARKER = re.compile(r'(?m)^<\|endoftext\|>(?:\n|\Z)')  # on a line of its own it ends a document

def find_files(paths):
    """Files as they are, folders as the files in them, sorted, hidden ones left out."""
    found = []
    for path in paths:
        inside = [path]
        if not os.path.exists(path):
            raise FileNotFoundError(f"there is no file or folder {path}")
        if os.path.isdir(path):
            names = glob.glob(os.path.join(glob.escape(path), '**'), recursive=True)
            files = {os.path.realpath(name): name for name in names if os.path.isfile(name)}
            inside = sorted(files.values(), key=Path)  # once, though links lead in circles
            if not files:
                raise ValueError(f"folder {path} holds no files: put UTF-8 text files into it")
        elif not os.path.isfile(path):
            raise ValueError(f"{path} can be read only once: save it as a file")
        found += inside
    return found

def read_text(path):
    """The text of a file in pieces, its line ends as \\n. Raises ValueError at a bad byte."""
    with open(path, encoding='utf-8-sig') as f:  # -sig: without the mark that some editors write
        try:
            while text := f.read(PIECE):
                yield text
        except UnicodeDecodeError as e:
            offset = f.buffer.tell() - len(e.object) + e.start
            raise ValueError(f"{path} is not UTF-8: the byte at offset {offset} cannot be read as "
                             "text. Convert the file, or leave it out") from None

def read_lines(path):
    """(number, line) of every line of a text file, counted from 1."""
    n, rest = 1, ''
    for text in read_text(path):
        *lines, rest = (rest + text).split('\n')
        yield from enumerate(lines, n)
        n += len(lines)
    if rest:
        yield n, rest

def is_json_lines(path):
    """Whether a file has a JSON object a line: its name tells, or the first line of a .json."""
    if not path.endswith('.json'):
        return path.endswith(('.jsonl', '.ndjson', '.jsonlines'))
    try:
        return isinstance(json.loads(next(read_lines(path))[1]), dict)
    except (StopIteration, ValueError):
        return False

def read_rows(path, names, optional=()):
    """(number, texts) of every row: JSON lines with the keys `names`, or columns between tabs."""
    as_json = is_json_lines(path)
    for n, line in read_lines(path):
        if not as_json:
            yield n, line.split('\t')
        elif line.strip():
            try:
                row = json.loads(line)
                if isinstance(row.get('label'), (int, float)):
                    row['label'] = json.dumps(row['label'])
                texts = [row[name] for name in names]
                texts += [row[name] for name in optional if name in row]
                ''.join(texts).encode()  # each a text, and no half of a surrogate pair
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                example = json.dumps(dict.fromkeys(names, '...'))
                raise ValueError(f"{path}, line {n}: a row must be JSON with texts, such as "
                                 f"{example} ({type(e).__name__})") from None
            yield n, texts

def read_pieces(path):
    """
    Yield a file as (text, ends_document), up to PIECE characters at a time. Documents are the rows
    of JSON lines, or what lies between lines that hold only <|endoftext|>; they may be empty.
    """
    if is_json_lines(path):
        for _, (text,) in read_rows(path, ['text']):
            yield text, True
        return
    for piece in safe_pieces(read_text(path), PIECE):
        *documents, rest = MARKER.split(piece)
        for text in documents:
            yield text, True
        yield rest, False
    yield '', True

def split_pieces(pieces, cut):
    """(split, text, ends_document): the first `cut` characters are train, what follows is val."""
    seen, split = 0, 'train' if cut else 'val'
    for text, ends in pieces:
        size = max(0, cut - seen)
        seen += len(text)
        if 0 < size < len(text):  # the document goes on in the other split, without an end between
            yield 'train', text[:size], False
            text = text[size:]
        if text:
            split = 'train' if seen <= cut else 'val'
        yield split, text, ends

# -----------------------------------------------------------------------------
# Writing a folder

def write_json(path, data):
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(data, f, ensure_ascii=False, indent=1)

def read_json(path):
    """Raises ValueError where the file is not JSON."""
    data = Path(path).read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        if data.startswith(b'version https://git-lfs'):
            raise ValueError(f"{path} is a git-LFS pointer: fetch the file itself") from None
        raise ValueError(f"{path} is damaged ({e}): make or fetch it again") from None

@contextlib.contextmanager
def new_folder(path):
    """
    with new_folder(path) as temporary: ... The folder gets its name when all of it is written, in
    the place of an older data folder; after an error nothing is left.
    """
    path = os.path.realpath(path)  # a link stays a link
    meta = Path(path, 'meta.json')
    ours = meta.exists() and b'plainformer data' in meta.read_bytes()
    if os.path.exists(path) and not ours and (os.path.isfile(path) or os.listdir(path)):
        raise ValueError(f"--out_dir {path} exists and is not a data folder: choose another name, "
                         "or move it away")
    beside = next(parent for parent in Path(path).parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=beside, prefix='.') as temporary:
        new, old = os.path.join(temporary, 'new'), os.path.join(temporary, 'old')
        os.mkdir(new)
        yield new
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.exists(path):
            os.rename(path, old)
        os.rename(new, path)

def sha256_of(paths):
    digest = hashlib.sha256()
    for path in paths:
        with open(path, 'rb') as f:
            while data := f.read(PIECE):
                digest.update(data)
    return digest.hexdigest()

def batches(pieces):
    """Short pieces, in lists of about PIECE characters: work for all cores."""
    batch, size = [], 0
    for text, ends in pieces:
        *parts, last = short_pieces(text)
        batch += [*((part, False) for part in parts), (last, ends)]
        size += len(text)
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    yield batch

def write_ids(path, dtype, tokenizer, pieces):
    """(text, ends_document) pieces -> a file of ids. Returns the counts of what is in it."""
    counts = dict.fromkeys(('tokens', 'documents', 'characters', 'bytes'), 0)
    is_open = False  # a document has begun
    with open(path, 'wb') as f:
        for batch in batches(pieces):
            encoded = tokenizer.encode_batch([text for text, _ in batch])
            for (text, ends), ids in zip(batch, encoded):
                is_open = is_open or len(ids) > 0
                if ends and is_open:
                    ids, is_open = np.append(ids, tokenizer.end_id), False
                    counts['documents'] += 1
                f.write(ids.astype(dtype).tobytes())
                counts['tokens'] += len(ids)
                counts['characters'] += len(text)
                counts['bytes'] += len(text.encode())
            progress(f"encoding: {counts['characters'] / 1e6:,.1f} M characters")
    counts['documents'] += is_open  # cut in two by the split: it counts on both sides
    return counts

# -----------------------------------------------------------------------------
# Tasks. A reader turns a file into rows: dicts of texts, and `where` (file, line). A row that is
# to be answered has no label, tags or answers. `..._examples` turns a row into examples: dicts with
# arguments of model.forward(), and with `meta`, which holds what only scoring needs.

IGNORE_INDEX = -100  # a position without a target, as in model.py
HEADERS = {'label', 'text', 'text_b', 'sentence', 'sentence1', 'sentence2', 'source', 'target'}

def read_columns(path, names, optional=()):
    """Rows of columns with these names: with tabs between them, or JSON lines."""
    columns, blank = '<TAB>'.join(names) + ''.join(f'[<TAB>{name}]' for name in optional), 0
    for n, texts in read_rows(path, names, optional):
        where, filled = f'{path}, line {n}', sum(text.strip() != '' for text in texts)
        if not filled:
            blank = blank or n
            continue
        if blank and not optional:
            raise ValueError(f"{path}, line {blank}: must be {columns}, and is empty: a lost text?")
        if n == 1 and HEADERS.issuperset(text.lower() for text in texts):
            raise ValueError(f"{where} looks like a header: leave it out")
        if filled < len(texts) or not len(names) <= filled <= len(names) + len(optional):
            raise ValueError(f"{where}: {texts[0][:40]!r} ... must be {columns}, and has "
                             f"{len(texts)} columns, {len(texts) - filled} of them empty")
        row = dict(zip((*names, *optional), texts))
        if 'label' in row:
            row['label'] = ' '.join(row['label'].split())
        yield {'where': where, **row}

def read_tagged(path):
    """
    CoNLL: a token a line and its tag (O, B-kind or I-kind) in the last column, with tabs or spaces
    between columns, and a blank line between texts.
    """
    tokens, tags, columns, first = [], [], 0, 1
    for n, line in itertools.chain(read_lines(path), [(None, '')]):
        if not line.strip(' \t') or line.startswith('-DOCSTART-'):
            if tokens:
                yield {'where': f'{path}, line {first}', 'tokens': tokens, 'tags': tags}
            tokens, tags = [], []
            continue
        fields = re.split('\t' if '\t' in line else ' +', line.strip(' '))
        columns = columns or max(2, len(fields))
        if len(fields) != columns or not fields[0] or not re.fullmatch(r'O|[BI]-\S+', fields[-1]):
            raise ValueError(f"{path}, line {n}: {line[:40]!r} must be a token and, in column "
                             f"{columns}, its tag: O, B-kind where an entity begins, I-kind inside")
        if not tokens:
            first = n
        tokens.append(fields[0])
        tags.append(fields[-1])

def read_questions(path):
    """SQuAD's JSON [4]: data > paragraphs > context, qas > question, answers > answer_start."""
    text, rows, wrong, where = ''.join(read_text(path)), [], [], path
    lines = (n for n, line in enumerate(text.split('\n'), 1) for _ in re.findall(r'"id"\s*:', line))
    try:
        for paragraph in (p for article in json.loads(text)['data'] for p in article['paragraphs']):
            context = paragraph['context']
            for question in paragraph['qas']:
                where = f"{path}, line {next(lines, 1)} (question {question['id']})"
                answers = [(a['answer_start'], a['text']) for a in question['answers']]
                rows.append({'where': where, 'id': question['id'], 'context': context,
                             'question': question['question'], 'answers': answers})
                (context + question['question']).encode()  # no half of a surrogate pair
                for start, answer in answers:
                    if start < 0 or not answer.strip() or not context.startswith(answer, start):
                        wrong.append(f"{answer[:40]!r} is not at {start} ({where})")
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as e:
        raise ValueError(f"{where}: this is not as SQuAD's JSON has it, where each question has "
                         f"answers, or [] ({type(e).__name__}: {e})") from None
    if wrong:
        raise ValueError(f"{path}: {len(wrong):,} answers do not stand at their answer_start. The "
                         f"first: {wrong[0]}")
    return rows

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

def pick(row, *names):
    """The part of a dict with these keys, as far as it has them."""
    return {name: row[name] for name in names if name in row}

def classify_examples(tokenizer, row, labels, block_size):
    """
    One class for a text, or for a pair. What is too long loses the end of the longer text.

        ids        [CLS] a funny film [SEP]
        targets    1                           of the labels negative, positive
    """
    texts = [tokenizer.encode(text).tolist() for text in pick(row, 'text', 'text_b').values()]
    while sum(map(len, texts)) > block_size - 1 - len(texts):
        max(texts, key=len).pop()
    ids, segments = add_special_tokens(tokenizer, *texts)
    example = {'ids': ids, 'segments': segments}
    if 'label' in row:
        example['targets'] = labels.index(row['label'])
    return [example | {'meta': pick(row, 'label', 'text', 'text_b')}]

def tag_examples(tokenizer, row, labels, block_size):
    """
    One class for each token of the text, predicted at its first piece [3, section 5.3]. A text that
    is longer than block_size is cut into several examples.

        tokens    Angela       Merkel       spoke
        ids       Ang  ela     Mer  kel     spoke
        targets   B-person .   I-person .   O           a dot is IGNORE_INDEX

    meta: `first` is the place of the first piece of each token, or -1 for a token without a piece
    of its own: some tokenizers drop characters such as U+200B.
    """
    tokens = row['tokens']
    ids, offsets = tokenizer.encode_with_offsets(' '.join(tokens))
    ends = np.cumsum([len(token) + 1 for token in tokens]) - 1
    starts = [0, *(ends[:-1] + 1)]
    first = np.searchsorted(offsets[:, 1], starts, side='right')  # the first piece that ends later
    has_piece = first < np.searchsorted(offsets[:, 0], ends)      # and begins before the token ends
    before = np.maximum.accumulate(np.where(has_piece, first, -1))[:-1]
    has_piece[1:] &= first[1:] > before
    stops = [*first[1:], len(ids)]
    examples, begin = [], 0
    while begin < len(tokens):
        end = begin + 1
        while end < len(tokens) and stops[end] - first[begin] <= block_size - 2:
            end += 1
        part = ids[first[begin]:stops[end - 1]][:block_size - 2].tolist()
        part, _ = add_special_tokens(tokenizer, part)
        places = np.where(has_piece, first - first[begin] + 1, -1)[begin:end].tolist()
        example = {'ids': part, 'meta': {'tokens': tokens[begin:end], 'first': places}}
        if 'tags' in row:
            example['meta']['tags'] = row['tags'][begin:end]
            example['targets'] = [IGNORE_INDEX] * len(part)
            for place, tag in zip(places, row['tags'][begin:end]):
                if place >= 0:
                    example['targets'][place] = labels.index(tag)
        examples.append(example)
        begin = end
    return examples

def tokens_between(offsets, start, stop):
    """The first and the last token of text[start:stop]; the tokenizer may drop its last accents."""
    first, last = np.searchsorted(offsets[:, 1], [start, stop - 1], side='right')
    return np.array([first, min(last, np.searchsorted(offsets[:, 0], stop) - 1)])

def encode_context(tokenizer, context, start, stop):
    """ids and offsets of a context, and the first and last token of its answer [start:stop]."""
    ids, offsets = tokenizer.encode_with_offsets(context)
    first, last = answer = tokens_between(offsets, start, stop)
    if context[offsets[first, 0]:offsets[last, 1]].strip() == context[start:stop].strip():
        return ids, offsets, answer
    parts = []  # the answer begins or ends inside of a token: encode it apart from what is around
    for a, b in itertools.pairwise([0, start, stop, len(context)]):
        part, places = tokenizer.encode_with_offsets(context[a:b])
        parts.append((part, places + a))
    ids, offsets = map(np.concatenate, zip(*parts))
    return ids, offsets, tokens_between(offsets, start, stop)

def qa_examples(tokenizer, row, labels, block_size):
    """
    Where in the context do the first and the last token of the answer stand? A long context is cut
    into windows that overlap by half, each an example. Where the window does not hold the answer,
    both targets are 0, the place of [CLS].

        ids       [CLS] which city [SEP] Oslo is old . [SEP]
        targets   4, 4                                          of Oslo

    meta: the text of the window as `context`, which begins at `start` of the whole; the place of
    its first token as `first`; what each token holds of it as `offsets`.
    """
    question = tokenizer.encode(row['question']).tolist()[:block_size // 2]
    context, size, place = row['context'], block_size - 3 - len(question), len(question) + 2
    if row.get('answers'):
        start, text = row['answers'][0]
        ids, offsets, (first, last) = encode_context(tokenizer, context, start, start + len(text))
        if last - first >= size:
            raise ValueError(f"the answer {text[:40]!r} has {last - first + 1} tokens, more than a "
                             f"window of block_size={block_size} holds beside its question: "
                             "prepare (and train) with a larger --block_size, or leave it out")
    else:
        ids, offsets = tokenizer.encode_with_offsets(context)
        first = last = -1  # in no window
    holds = lambda begin: begin <= first and last < begin + size
    end = max(0, len(ids) - size)
    begins = {*range(0, end, max(1, size // 2)), end}
    if first >= 0 and not any(map(holds, begins)):
        begins.add(int(first))
    examples = []
    for begin in sorted(begins):
        window, spans = ids[begin:begin + size].tolist(), offsets[begin:begin + size]
        low, high = (int(spans[0, 0]), int(spans[-1, 1])) if window else (0, 0)
        framed, segments = add_special_tokens(tokenizer, question, window)
        meta = {'question': row['question'], 'context': context[low:high], 'start': low,
                'first': place, 'offsets': (spans - low).tolist()}
        example = {'ids': framed, 'segments': segments, 'meta': meta}
        if 'answers' in row:
            shift = place - begin
            example['targets'] = [int(first + shift), int(last + shift)] if holds(begin) else [0, 0]
            meta |= {'id': row['id'], 'answers': [text for _, text in row['answers']]}
        examples.append(example)
    return examples

def seq2seq_examples(tokenizer, row, labels, block_size):
    """
    A text in, a text out. The decoder begins with <|endoftext|>, or with <|start|> where a model
    has it, and is to end with <|endoftext|>.

        ids            twenty one <|endoftext|>
        decoder_ids    <|endoftext|> 2 1
        targets        2 1 <|endoftext|>
    """
    example = {'meta': pick(row, 'source', 'target')}
    for name, text in example['meta'].items():
        ids = [*tokenizer.encode(text).tolist(), tokenizer.end_id]
        if len(ids) > block_size:
            raise ValueError(f"the {name} {text[:40]!r} has {len(ids)} tokens with its end, more "
                             f"than block_size={block_size}: shorten it, or prepare (and train) "
                             "with a larger --block_size")
        if name == 'source':
            example['ids'] = ids
        else:
            example |= {'decoder_ids': [tokenizer.start_id, *ids[:-1]], 'targets': ids}
    return [example]

class Task(NamedTuple):
    """One kind of labelled data."""
    read: Callable         # path -> rows
    texts: Callable        # row -> its texts, from which a tokenizer may learn
    labels_of: Callable    # row -> its labels
    label_names: Callable  # the labels of all rows -> a list of those to choose from
    examples: Callable     # (tokenizer, row, labels, block_size) -> examples

def tag_names(labels):
    """O, and for each kind B-kind and I-kind, seen or not."""
    kinds = sorted({label[2:] for label in labels} - {''})
    return ['O', *(prefix + kind for kind in kinds for prefix in ('B-', 'I-'))]

TASKS = {
    'classify': Task(lambda path: read_columns(path, ('label', 'text'), ('text_b',)),
                     lambda row: pick(row, 'text', 'text_b').values(),
                     lambda row: [row['label']], sorted, classify_examples),
    'tag': Task(read_tagged,
                lambda row: [' '.join(row['tokens'])],
                lambda row: row['tags'], tag_names, tag_examples),
    'qa': Task(read_questions,
               lambda row: [row['question'], row['context']],
               lambda row: [] if row['answers'] else ['no answer'], sorted, qa_examples),
    'seq2seq': Task(lambda path: read_columns(path, ('source', 'target')),
                    lambda row: [row['source'], row['target']],
                    lambda row: [], sorted, seq2seq_examples),
}

def split_rows(rows, val_fraction):
    """
    Shuffle, the same way every time, and cut: (train rows, val rows). Questions about one context
    stay together, or validation would be about texts that were learned by heart.
    """
    groups, train = collections.defaultdict(list), []
    for i, row in enumerate(rows):
        groups[row.get('context', i)].append(row)
    groups = [*groups.values()]
    order = [groups[i] for i in np.random.default_rng(0).permutation(len(groups))]
    while order and len(train) + len(order[0]) <= len(rows) * (1 - val_fraction):
        train += order.pop(0)
    return train, list(itertools.chain(*order))

def some_of(labels):
    return ', '.join(labels[:10]) + ', ...' * (len(labels) > 10)

def check_labels(task, rows, labels):
    """Raise ValueError, with file and line, at the first row with a label that is not known."""
    for row in rows:
        unknown = set(TASKS[task].labels_of(row)).difference(labels)
        if unknown and task != 'qa':  # any question may be one without an answer
            raise ValueError(f"{row['where']}: the label {min(unknown)!r} is unknown: the training "
                             f"data has {some_of(labels)}")

def encode_rows(tokenizer, task, rows, labels, block_size):
    """The examples of all rows; `row` in meta is the number of the row. Raises ValueError."""
    examples = []
    for i, row in enumerate(rows):
        try:
            made = TASKS[task].examples(tokenizer, row, labels, block_size)
        except ValueError as e:
            raise ValueError(f"{row['where']}: {e}" if 'where' in row else str(e)) from None
        for example in made:
            example['meta']['row'] = i
        examples += made
        progress(f"encoding: row {i:,} of {len(rows):,}")
    progress('')
    return examples

# -----------------------------------------------------------------------------
# Built-in data sets: functions that return a text, or two: one to train, one to validate

UPSTREAM = 'https://raw.githubusercontent.com/'
M30K = 'multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw/'
DOWNLOADS = {  # {address below UPSTREAM: sha256}
    'shakespeare': {
        'karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt':
        '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'},
    'rotten_tomatoes': {
        'yoonkim/CNN_sentence/23e0e1f7355705bb083043fda05c031b15acb38c/rt-polarity.pos':
        '2da124ec187a9d5a29c9f04e91c540e02baed5af8868f550a26bd6fd4dbf8bf0',
        'yoonkim/CNN_sentence/23e0e1f7355705bb083043fda05c031b15acb38c/rt-polarity.neg':
        '4ace77d558c3714723843f1d65b60c01e3417b208180f0728808d76ad0eeeaca'},
    'wnut17': {
        'leondz/emerging_entities_17/e52a2d2a71ac1a051ca2d532eef28653c5c02603/wnut17train.conll':
        '731820e13f71af324c6b55a1575ec2ce59fbaa2a0806f8f0400b98d56cd6a7a5',
        'leondz/emerging_entities_17/e52a2d2a71ac1a051ca2d532eef28653c5c02603/emerging.dev.conll':
        'e053b752b8155113ca66e7db08af5f2f5f43ab993694e4774f1ec5bad42312d8'},
    'multi30k': {
        M30K + 'train.en.gz': 'd79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f',
        M30K + 'train.de.gz': '726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6',
        M30K + 'val.en.gz': '14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28',
        M30K + 'val.de.gz': 'f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a'},
}

def download(name, mirror):
    """Yield the files of DOWNLOADS[name]. mirror: a URL or a folder in the place of UPSTREAM."""
    for path, sha256 in DOWNLOADS[name].items():
        address = (mirror or UPSTREAM).rstrip('/') + '/' + path
        progress(f"downloading {address}")
        try:
            with (urllib.request.urlopen(address, timeout=60) if '://' in address
                  else open(address, 'rb')) as f:
                data = f.read()
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise ValueError(f"{address} could not be read ({e}): go online, or give --mirror URL "
                             "or FOLDER that has it") from None
        progress('')
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise ValueError(f"{address} is not the expected file: sha256 {found[:12]}… instead of "
                             f"{sha256[:12]}…. Try again, or give another --mirror")
        yield data

def shakespeare(mirror):
    """1.1 MB of plays, in English."""
    return [data.decode() for data in download('shakespeare', mirror)]

def wnut17(mirror):
    """Names in tweets (Derczynski et al. 2017), CoNLL. Those of val do not occur in train."""
    return [data.decode() for data in download('wnut17', mirror)]

def rotten_tomatoes(mirror):
    """10,662 sentences of film reviews (Pang and Lee 2005), 80 % to train, 10 % to validate."""
    rows = []
    for label, data in zip(('positive', 'negative'), download('rotten_tomatoes', mirror)):
        for line in data.decode('cp1252').strip().split('\n'):
            rows.append(f'{label}\t{line.strip()}\n')
    random.Random(0).shuffle(rows)
    train, val = int(0.8 * len(rows)), int(0.9 * len(rows))  # the rest is for tests
    return [''.join(rows[:train]), ''.join(rows[train:val])]

def multi30k(mirror):
    """29,000 captions of pictures, English to German (Elliott et al. 2016), and 1,014 for val."""
    sides = []
    for data in download('multi30k', mirror):
        lines = gzip.decompress(data).decode().strip('\n').split('\n')
        sides.append([' '.join(line.split()) for line in lines])
    return [''.join(f'{source}\t{target}\n' for source, target in zip(*pair, strict=True))
            for pair in (sides[:2], sides[2:])]

def shuffled(texts):
    """In an order by hash, which is the same everywhere."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())

def library():
    """(name, source) of the modules of Python's own library, as bytes. They are not imported."""
    root = os.path.dirname(os.__file__)
    skip = {'site-packages', 'test', 'tests', 'idlelib', 'lib2to3', '__pycache__'}
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - skip
        for name in names:
            path = Path(folder, name)
            if path.suffix == '.py':
                module = '.'.join(path.relative_to(root).with_suffix('').parts)
                yield module.removesuffix('.__init__'), path.read_bytes()

def docstrings(node, title, prefix=''):
    """(title, docstring) of a module or class, and of the classes and functions in it."""
    yield title, ast.get_docstring(node)
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            name = prefix + child.name
            yield from docstrings(child, f'class {name}', f'{name}.')
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            title = f'{prefix}{child.name}({ast.unparse(child.args)})'
            yield title, ast.get_docstring(child)

def documented_library():
    """(module, [(title, docstring), ...]) of Python's library; its own docstring may be None."""
    for module, source in library():
        with contextlib.suppress(SyntaxError, ValueError):
            first, *others = docstrings(ast.parse(source), module)
            yield module, [first, *((title, text) for title, text in others if text)]

def pydoc(mirror=None):
    """
    Python's documentation: the topics of its manual, and the docstrings of its library. A topic or
    a module is a document.
    """
    from pydoc_data.topics import topics
    documents = [f'{name}\n\n{text.strip()}\n' for name, text in topics.items()]
    for module, found in documented_library():
        parts = [f'{title}\n\n{text}\n' if text else f'{title}\n' for title, text in found]
        if found != [(module, None)]:
            documents.append('\n'.join(parts))
    return ['<|endoftext|>\n'.join(shuffled(documents))]

def pytopics(mirror=None):
    """Which package of Python's library is a docstring from? The twelve with the most of them."""
    texts = collections.defaultdict(set)
    for module, found in documented_library():
        for _, text in found:
            text = ' '.join((text or '').split())
            if len(text) >= 20:
                texts[module.split('.')[0]].add(text)
    most = sorted(texts, key=lambda package: (-len(texts[package]), package))[:12]
    rows = shuffled(f'{package}\t{text}' for package in most for text in texts[package])
    return ['\n'.join(rows)]

def pytokens(mirror=None):
    """
    The kinds of the words of Python source, CoNLL: keyword, name, number, string, comment, and O
    for an operator. A logical line is a text; strings and comments may have several words.
    """
    texts = set()
    for _, source in library():
        row = []
        with contextlib.suppress(tokenize.TokenError, SyntaxError, UnicodeDecodeError):
            for token in tokenize.tokenize(io.BytesIO(source).readline):
                kind = tokenize.tok_name[token.type].lower()
                if keyword.iskeyword(token.string):
                    kind = 'keyword'
                kind = re.sub('^fstring.*', 'string', kind)
                if kind in ('keyword', 'name', 'number', 'string', 'comment', 'op'):
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

def numbers(mirror=None):
    """Number words to digits: all below 1,000, and about as many of 4, 5 and 6 digits."""
    rng, chosen = random.Random(0), set(range(1, 1000))
    while len(chosen) < 20_000:
        chosen.add(rng.randrange(1, 10 ** rng.randint(4, 6)))
    return ['\n'.join(shuffled(f'{in_words(n)}\t{n}' for n in chosen))]

def recall(mirror=None):
    """
    Learning in context: in every document 8 letters stand for a digit each, anew every time, and 30
    of those pairs follow each other, as in k7a2k7x0a2... Only the text shows the digit of a letter.
    """
    rng, texts = random.Random(0), []
    for n in (40_000, 1000):
        documents = []
        for _ in range(n):
            pairs = [f'{c}{rng.randrange(10)}' for c in rng.sample(string.ascii_lowercase, 8)]
            documents.append(''.join(rng.choices(pairs, k=30)) + '\n')
        texts.append('<|endoftext|>\n'.join(documents))
    return texts

DATASETS = {  # the task, and the function
    'pydoc': ('lm', pydoc), 'recall': ('lm', recall), 'shakespeare': ('lm', shakespeare),
    'pytopics': ('classify', pytopics), 'rotten_tomatoes': ('classify', rotten_tomatoes),
    'pytokens': ('tag', pytokens), 'wnut17': ('tag', wnut17),
    'numbers': ('seq2seq', numbers), 'multi30k': ('seq2seq', multi30k),
}

# -----------------------------------------------------------------------------
# The script

BPE_SAMPLE = 50_000_000  # characters that bpe learns from

@dataclass
class Settings:
    """The flags of this script."""
    dataset: str = flag('', 'a built-in data set; pydoc needs no network', ('', *DATASETS))
    input: list = flag([], 'UTF-8 text files, folders of them, or .jsonl files with a "text" a row')
    val: list = flag([], 'the same for the validation split, instead of the end of the text')
    task: str = flag('', 'what the data is for: lm to pre-train, the others to fine-tune '
                         '[lm, or that of the data set]', ('', 'lm', *TASKS))
    tokenizer: str = flag('bpe', 'char | byte | bpe | gpt2 | a data or Hugging Face folder whose '
                                 'tokenizer is to be used')
    vocab_size: int = flag(4096, 'of bpe: all tokens, special ones included', low=1)
    val_fraction: float = flag(0.1, 'share for validation: the end of the text; of a task any rows',
                               above=0, below=1)
    block_size: int = flag(64, 'of a task: longest example, in tokens; what is longer is cut, or '
                               'makes several', low=8)
    out_dir: str = flag('', 'folder to write, data/NAME if not given')
    show: str = flag('', 'a text: print how it becomes tokens, step by step, and do nothing else')
    mirror: str = flag('', f'URL or folder to download from, instead of {UPSTREAM}')
    config: str = flag('', 'a TOML file of flags; those of the command line count more')

def choose_tokenizer(settings, characters, texts):
    """The tokenizer of the flags: char has a set of characters, bpe learns from texts."""
    name = settings.tokenizer
    if name == 'char':
        return char_tokenizer(characters)
    if name == 'byte':
        return byte_tokenizer()
    if name == 'bpe':
        return bpe_tokenizer(texts, settings.vocab_size)
    if name == 'gpt2':
        return gpt2_tokenizer()
    folder = name if os.path.isdir(name) else os.path.join('data', name)
    if not os.path.isdir(folder):
        raise ValueError(f"--tokenizer {name}: choose char, byte, bpe, gpt2, or the folder of data "
                         "that was prepared (python prepare_data.py --dataset pydoc)")
    return load_tokenizer(folder)

def prepare_text(settings, folder, files, val_files):
    """Text -> the files to pre-train on. Returns the tokenizer, and what meta.json says of them."""
    pieces = lambda files: itertools.chain.from_iterable(map(read_pieces, files))
    sizes, characters = [], set()
    for paths in (files, val_files):
        sizes.append(0)
        for text, _ in pieces(paths):
            sizes[-1] += len(text)
            characters.update(text)
            progress(f"reading: {sum(sizes) / 1e6:,.1f} M characters")
    cut = sizes[0] if val_files else int(sizes[0] * (1 - settings.val_fraction))
    sample = split_pieces(pieces(files), min(cut, BPE_SAMPLE))
    texts = (text for _, text, _ in itertools.takewhile(lambda piece: piece[0] == 'train', sample))
    tokenizer = choose_tokenizer(settings, characters, texts)
    dtype = 'uint16' if tokenizer.n_vocab <= 2 ** 16 else 'uint32'
    both = itertools.chain(split_pieces(pieces(files), cut), split_pieces(pieces(val_files), 0))
    counts = {}
    for split, group in itertools.groupby(both, key=operator.itemgetter(0)):
        path = os.path.join(folder, f'{split}.bin')
        counts[split] = write_ids(path, dtype, tokenizer, (piece[1:] for piece in group))
    progress('')
    for split in ('train', 'val'):
        if split not in counts or counts[split]['tokens'] < 2:
            raise ValueError(f"{files[0]}: a text of {sum(sizes):,} characters is too short for a "
                             f"{split} split: add text, change --val_fraction, or give --val FILE")
    return tokenizer, {'dtype': dtype, 'counts': counts, 'labels': []}

def prepare_task(settings, task, folder, files, val_files):
    """Labelled rows -> the files to fine-tune on. Returns what prepare_text returns."""
    _, texts, labels_of, label_names, _ = TASKS[task]
    read = lambda paths: [row for path in paths for row in TASKS[task].read(path)]
    rows, val_rows = read(files), read(val_files)
    splits = (rows, val_rows) if val_files else split_rows(rows, settings.val_fraction)
    if not all(splits):
        raise ValueError(f"{files[0]}: {len(rows)} rows are too few for a train and a val split: "
                         "give more, change --val_fraction, or give --val FILE")
    labels = label_names({label for row in rows for label in labels_of(row)})
    if len(labels) > max(100, len(rows) // 2):
        raise ValueError(f"{files[0]}: {len(labels):,} different labels in {len(rows):,} rows: the "
                         "label must stand in the first column")
    if len(labels) == 1 and task != 'qa':
        raise ValueError(f"{files[0]}: all rows have the label {labels[0]!r}: give rows of at "
                         "least two labels")
    check_labels(task, val_rows, labels)
    characters = set().union(*(text for row in rows + val_rows for text in texts(row)))
    unique = dict.fromkeys(text for row in splits[0] for text in texts(row))
    tokenizer, counts = choose_tokenizer(settings, characters, unique), {}
    for split, rows in zip(('train', 'val'), splits):
        examples = encode_rows(tokenizer, task, rows, labels, settings.block_size)
        sizes = [len(example['ids']) for example in examples]
        n_bytes = sum(len(text.encode()) for row in rows for text in texts(row))
        counts[split] = {'rows': len(rows), 'examples': len(examples), 'tokens': sum(sizes),
                         'full': sizes.count(settings.block_size), 'bytes': n_bytes}
        lines = [json.dumps(example, ensure_ascii=False) + '\n' for example in examples]
        Path(folder, f'{split}.jsonl').write_text(''.join(lines), encoding='utf-8', newline='\n')
    return tokenizer, {'counts': counts, 'labels': labels, 'block_size': settings.block_size}

def prepare(settings):
    """Make the data folder of the flags. Returns its path and meta; raises ValueError, OSError."""
    check_flags(settings)
    name, files, val_files = settings.dataset, settings.input, settings.val
    if bool(name) == bool(files):
        raise ValueError(f"give either --input PATH... or --dataset NAME: {', '.join(DATASETS)}. "
                         "For a first try: --dataset pydoc")
    usual, make = DATASETS.get(name, ('lm', None))
    task = settings.task or usual
    if name and task != usual:
        raise ValueError(f"--task {task}: {name} is for {usual}: leave the flag out")
    out_dir = settings.out_dir or os.path.join('data', name or Path(os.path.abspath(files[0])).stem)
    with new_folder(out_dir) as folder:
        if make:
            paths = [os.path.join(folder, 'source.txt'), os.path.join(folder, 'source.val.txt')]
            texts = make(settings.mirror)
            for path, text in zip(paths, texts):
                Path(path).write_text(text, encoding='utf-8', newline='\n')
            files, val_files = paths[:1], val_files or paths[1:len(texts)]
        files, val_files = find_files(files), find_files(val_files)
        if task == 'lm':
            tokenizer, made = prepare_text(settings, folder, files, val_files)
        else:
            tokenizer, made = prepare_task(settings, task, folder, files, val_files)
        meta = {'format': 'plainformer data 2', 'task': task, 'tokenizer': tokenizer.name,
                'vocab_size': tokenizer.n_vocab, **made, 'source': name or settings.input,
                'sha256': sha256_of(files)}
        if val_files:
            meta['val_sha256'] = sha256_of(val_files)
        write_json(os.path.join(folder, 'tokenizer.json'), tokenizer.to_dict())
        write_json(os.path.join(folder, 'meta.json'), meta)
    return out_dir, meta

def main(argv):
    settings = Settings(**read_flags(argv, __doc__, {'flags': Settings}))
    if settings.show:
        check_flags(settings)
        if settings.tokenizer == 'bpe':  # learned before: that of a data set
            settings.tokenizer = settings.out_dir or settings.dataset or 'pydoc'
        tokenizer = choose_tokenizer(settings, {*settings.show}, [])
        return print(*explain(tokenizer, settings.show), sep='\n')
    out_dir, meta = prepare(settings)
    for split, counts in meta['counts'].items():
        names = pick(counts, 'tokens', 'characters', 'documents', 'rows', 'examples')
        parts = [f'{n:,} {name[:-1] if n == 1 else name}' for name, n in names.items()]
        print(f"{split + ':':6} {', '.join(parts)}")
    if meta['labels']:
        print(f"labels: {some_of(meta['labels'])}")
    full = sum(counts.get('full', 0) for counts in meta['counts'].values())
    if meta['task'] == 'classify' and full:
        print(f"{full:,} examples are as long as --block_size {meta['block_size']} tokens allows: "
              "their text may be cut")
    print(f"{out_dir}: {meta['tokenizer']} tokenizer, vocabulary of {meta['vocab_size']:,}. "
          f"Next: python train.py --dataset {out_dir.removeprefix('data' + os.sep)}")
    if settings.tokenizer == 'bpe' and meta['vocab_size'] < settings.vocab_size:
        print(f"the text has too few repeated pairs for --vocab_size {settings.vocab_size}: no "
              "more were merged")

if __name__ == '__main__':
    run(main)
