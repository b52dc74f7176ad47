"""
From text to numbers. A data set becomes a folder of plain files, which train.py reads:

    data/NAME/meta.json             what it is: task, vocabulary, counts, source and its sha256
    data/NAME/tokenizer.json        how text becomes ids and back
    data/NAME/train.bin, val.bin    one long row of ids (uint16 or uint32); a document ends in <|endoftext|>
    data/NAME/*.sentences.npy       (sentences, 2) int64: the first token and the document of every sentence
    data/NAME/source.txt            the text of a built-in data set

    python prepare_data.py --dataset pydoc                    Python's own documentation, offline
    python prepare_data.py --input book.txt notes/            your text: files, folders, JSONL with a `text` field

What the other scripts share with this one stands here too, since this is the first that a user runs: flags, errors of
one line, the progress line.

    flag, read_flags, run, progress     the command line
    tokenizers                          char, byte, bpe, gpt2: each is a tiktoken.Encoding
    read_documents, sentences           text from files, a piece at a time: memory does not grow with the corpus
    write_text                          the folder
    pydoc, shakespeare, tang            the built-in data sets

References:
    [1] Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword Units, https://arxiv.org/abs/1508.07909
    [2] Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2): byte-level BPE, section 2.2
"""

import argparse
import ast
import base64
import codecs
import collections
import contextlib
import dataclasses
import difflib
import hashlib
import heapq
import http.client
import io
import itertools
import json
import math
import operator
import os
import re
import shutil
import sys
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import tiktoken

# -----------------------------------------------------------------------------
# The command line. The fields of a dataclass are the flags of a script: --max_iters 10, --max_iters=10, --max-iters 10.


def flag(default, help, choices=None, low=None, high=None, above=None, below=None, kind=None):
    """
    A field of a dataclass of flags, with what it accepts: `low` and `high` included, `above` and `below` excluded. A flag
    whose default is None (something derives it) must tell its kind.
    """
    rules = {'help': help, 'choices': choices, 'low': low, 'high': high, 'above': above, 'below': below,
             'kind': kind or type(default)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=rules)
    return dataclasses.field(default=default, metadata=rules)


LIMITS = {'low': ('at least', operator.ge), 'above': ('above', operator.gt), 'high': ('at most', operator.le),
          'below': ('below', operator.lt)}


def check_flags(settings):
    """Raise ValueError for the first field of a dataclass of flags whose value breaks its rules."""
    for f in dataclasses.fields(settings):
        value, rules = getattr(settings, f.name), f.metadata
        if rules['choices'] and value not in rules['choices']:
            raise ValueError(f"--{f.name} {value}: choose one of {', '.join(filter(None, rules['choices']))}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            finite = isinstance(value, int) or math.isfinite(value)
            limits = {f'{text} {rules[name]}': holds(value, rules[name])
                      for name, (text, holds) in LIMITS.items() if rules[name] is not None}
            if not finite or not all(limits.values()):
                raise ValueError(f"--{f.name} {value}: must be " + ' and '.join([*['finite'][finite:], *limits]))


def parse_value(kind, text):
    """What the user wrote, as the type of its field. Raises ArgumentTypeError with a hint."""
    if kind is bool:
        if text.lower() in ('true', '1', 'yes', 'false', '0', 'no'):
            return text.lower() in ('true', '1', 'yes')
        raise argparse.ArgumentTypeError(f"{text} is neither True nor False")
    try:
        return kind(text)
    except ValueError:
        pass
    try:
        near = f", such as {int(float(text))}"
    except (ValueError, OverflowError):
        near = ''
    raise argparse.ArgumentTypeError(f"{text} is not a {'whole ' if kind is int else ''}number{near}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message.removeprefix('argument '))


def spell(word, known):
    """--max-iters=10 -> --max_iters=10, --no-tied -> --tied=False. Raises ValueError at a flag that is not in `known`."""
    name, equals, value = word.partition('=')
    if not name.startswith('--') or name in ('--', '--help'):
        return word
    plain = name[2:].replace('-', '_')
    if plain in known:
        return f'--{plain}{equals}{value}'
    if plain.startswith('no_') and known.get(plain[3:]) is bool and not equals:
        return f'--{plain[3:]}=False'
    near = difflib.get_close_matches(plain, known, n=1)
    raise ValueError(f"unknown flag {name}: " + (f"did you mean --{near[0]}?" if near else "see --help"))


def read_flags(argv, description, groups):
    """
    argv -> {name: value} of the flags that were given, and no others: the caller knows the defaults. groups: {title:
    dataclass}. Raises ValueError naming the flag that is unknown, or its value.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage='%(prog)s [--flag value ...]', allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    known = {}
    for title, cls in groups.items():
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(cls):
            default = None if f.default is dataclasses.MISSING else f.default
            kind, choices = f.metadata.get('kind') or type(default), f.metadata.get('choices')
            known[f.name] = kind
            about = f.metadata['help'] + (f": {' | '.join(filter(None, choices))}" if choices else '')
            about = (about if default in (None, '') else f'{about} [{default!r}]').replace('%', '%%')
            if kind is bool:
                group.add_argument(f'--{f.name}', nargs='?', const=True, help=about, metavar='True|False',
                                   type=lambda text: parse_value(bool, text))
            elif kind is list:
                group.add_argument(f'--{f.name}', nargs='+', action='extend', help=about, metavar='TEXT')
            else:
                group.add_argument(f'--{f.name}', type=lambda text, kind=kind: parse_value(kind, text), help=about,
                                   metavar=kind.__name__.upper())
    given, extra = parser.parse_known_args([spell(word, known) for word in argv])
    if extra:
        raise ValueError(f"{extra[0]} belongs to no flag: see --help")
    return vars(given)


def run(main):
    """Call main(argv). What the user can mend is one line on standard error and exit status 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(encoding='utf-8', errors='replace')  # whatever the console of Windows prefers
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as e:
        named = isinstance(e, OSError) and e.strerror
        message = f"{e.filename + ': ' if e.filename else ''}{e.strerror}" if named else str(e)
        progress('')
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        progress('')
        sys.exit(130)


def progress(text):
    """The one live line of long work: written over again on a terminal, nothing elsewhere. An empty text clears it."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print('\r' + text[:width] + '\x1b[K', end='', file=sys.stderr, flush=True)

# -----------------------------------------------------------------------------
# Tokenizers. Each is a tiktoken.Encoding: a pattern that cuts text into pieces, a table from bytes to ids, and special
# tokens outside of that table. Only pattern and table differ.

SPECIALS = ['<|endoftext|>', '[PAD]', '[CLS]', '[SEP]', '[MASK]'] + [f'<extra_{i}>' for i in range(100)]
PATTERNS = {
    'char': r'(?s:.)',
    'byte': r'(?s:.)',
    # letters, digits, or other signs, each with the one space before it; then what white space is left
    'bpe': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
FORMAT = 'plainformer tokenizer 1'


def make_tokenizer(name, pattern, ranks, specials=None):
    """ranks {bytes: id}; the special tokens that `specials` {text: id} lacks get the ids after all others."""
    specials = dict(specials or {})
    for text in SPECIALS:
        specials.setdefault(text, len(ranks) + len(specials))
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def char_tokenizer(characters):
    """One token for each character of the text."""
    return make_tokenizer('char', PATTERNS['char'], {c.encode(): i for i, c in enumerate(sorted(characters))})


def byte_tokenizer():
    """256 tokens, and no text that they cannot write."""
    return make_tokenizer('byte', PATTERNS['byte'], {bytes([b]): b for b in range(256)})


def gpt2_tokenizer():
    """GPT-2's, with our special tokens after its own 50,257. Raises ValueError where it cannot be had."""
    try:
        base = tiktoken.get_encoding('gpt2')
    except Exception as e:  # whatever the network layer raises
        raise ValueError(f"the gpt2 tokenizer could not be downloaded ({type(e).__name__}): go online once, or set "
                         "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bpe") from None
    return make_tokenizer('gpt2', base._pat_str, base._mergeable_ranks, base._special_tokens)


def learn_bpe(counts, n_tokens):
    """
    Byte-pair encoding [1] over bytes [2]: start from the 256 bytes, and again and again join the pair of neighbours
    that occurs most often; of equals, the one whose bytes come first. Merges never cross the pieces that the pattern
    cuts. counts {piece: how often} -> {bytes: id} with at most n_tokens entries; it stops early where no pair occurs
    twice. Each distinct piece is kept once, and a merge touches only the pieces that have the pair.
    """
    table = [bytes([b]) for b in range(256)]
    pieces = [list(piece.encode()) for piece in counts]
    weight = list(counts.values())
    pairs, where = collections.Counter(), collections.defaultdict(set)  # pair -> how often; in which pieces
    for i, tokens in enumerate(pieces):
        for pair in zip(tokens, tokens[1:]):
            pairs[pair] += weight[i]
            where[pair].add(i)
    # A heap of candidates. Counts change after they are pushed, so one that comes up stale is pushed again.
    entry = lambda pair: (-pairs[pair], table[pair[0]], table[pair[1]], pair)
    heap = [entry(pair) for pair in pairs]
    heapq.heapify(heap)
    while len(table) < n_tokens and heap:
        pushed, _, _, pair = heapq.heappop(heap)
        if -pushed != pairs[pair]:
            if pairs[pair] > 1:
                heapq.heappush(heap, entry(pair))
            continue
        if -pushed < 2:
            break
        new, (a, b) = len(table), pair
        table.append(table[a] + table[b])
        if len(table) % 64 == 0:
            progress(f"learning tokens: {len(table):,} of {n_tokens:,}")
        changed = collections.Counter()
        for i in where.pop(pair):
            old, merged, at = pieces[i], [], 0
            while at < len(old):  # from the left, each token used once: [a, b, c, a, b] -> [new, c, new]
                if old[at] == a and at + 1 < len(old) and old[at + 1] == b:
                    if merged:
                        changed[merged[-1], a] -= weight[i]
                        changed[merged[-1], new] += weight[i]
                        where[merged[-1], new].add(i)
                    if at + 2 < len(old):
                        changed[b, old[at + 2]] -= weight[i]
                        changed[new, old[at + 2]] += weight[i]
                        where[new, old[at + 2]].add(i)
                    merged.append(new)
                    at += 2
                else:
                    merged.append(old[at])
                    at += 1
            pieces[i] = merged
        del pairs[pair]
        for p, change in changed.items():
            pairs[p] += change
            if new in p and pairs[p] > 1:
                heapq.heappush(heap, entry(p))
    progress('')
    ranks = {}
    for token in table:
        ranks.setdefault(token, len(ranks))  # the same bytes may arise from two pairs: one entry
    return ranks


def bpe_tokenizer(texts, vocab_size):
    """Learn a byte-level BPE from an iterable of texts. vocab_size counts the special tokens too."""
    least = 256 + len(SPECIALS)
    if vocab_size < least:
        raise ValueError(f"--vocab_size {vocab_size}: a bpe vocabulary has 256 bytes and {len(SPECIALS)} special "
                         f"tokens: choose at least {least}")
    counts, pattern = collections.Counter(), regex.compile(PATTERNS['bpe'])
    for text in texts:
        counts.update(pattern.findall(text))
    return make_tokenizer('bpe', PATTERNS['bpe'], learn_bpe(counts, vocab_size - len(SPECIALS)))


def tokenizer_to_dict(tokenizer):
    """Plain data, for JSON and for checkpoints."""
    ranks = sorted(tokenizer._mergeable_ranks, key=tokenizer._mergeable_ranks.get)
    return {'format': FORMAT, 'name': tokenizer.name, 'pattern': tokenizer._pat_str,
            'specials': tokenizer._special_tokens, 'ranks': [base64.b64encode(token).decode() for token in ranks]}


def tokenizer_from_dict(saved):
    """The inverse. Raises ValueError where `saved` is not such a dict."""
    if not isinstance(saved, dict) or saved.get('format') != FORMAT:
        raise ValueError(f"this is not a tokenizer of this project: its 'format' is not {FORMAT!r}")
    try:
        ranks = {base64.b64decode(token, validate=True): i for i, token in enumerate(saved['ranks'])}
        ids = [*range(len(saved['ranks'])), *saved['specials'].values()]
        if len(ranks) != len(saved['ranks']) or len(set(ids)) != len(ids) or not set(SPECIALS) <= set(saved['specials']):
            raise ValueError("an entry occurs twice, or a special token is missing")
        return tiktoken.Encoding(saved['name'], pat_str=saved['pattern'], mergeable_ranks=ranks,
                                 special_tokens=saved['specials'])
    except Exception as e:
        raise ValueError(f"the tokenizer is damaged ({type(e).__name__}): prepare the data again") from None


def load_tokenizer(folder):
    """The tokenizer of a data folder. Raises ValueError or OSError."""
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.exists(path):
        raise FileNotFoundError(f"{folder} holds no tokenizer.json: give a folder that prepare_data.py made")
    return tokenizer_from_dict(read_json(path))


def encode(tokenizer, text):
    """
    text -> uint32 ids, (T,). Special tokens written in the text are text like any other. Raises ValueError naming the
    first character that a `char` tokenizer has never seen (tiktoken itself would panic).
    """
    if tokenizer.name == 'char':
        unknown = set(text).difference(c.decode() for c in tokenizer._mergeable_ranks)
        if unknown:
            at = min(text.index(c) for c in unknown)
            raise ValueError(f"the tokenizer has never seen {text[at]!r} (character {at + 1} of {text[:at + 20]!r}): "
                             "it knows only the characters of its own training text")
    try:
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half of a surrogate pair: not text, though a JSON file can hold it
        raise ValueError(f"this is not valid Unicode text: {text[:40]!r}") from None

# -----------------------------------------------------------------------------
# Text from files, a block at a time. A block ends where no tokenizer would put a piece across.

BLOCK = 1 << 20                                    # characters read at once
# No piece of the bpe pattern goes on into the white space that follows it, so cut there: best after a line end.
SAFE_CUT = [regex.compile(r'(?r)(?<=\S\n)(?=\S)'), regex.compile(r'(?r)(?<=\S)(?<!<\|endoftext\|>)(?=\s)')]
MARKER = re.compile(r'(?m)^<\|endoftext\|>(?:\n|\Z)')  # on a line of its own it begins a new document
BLANK = re.compile(r'\n[^\S\n]*\n')


class Block(NamedTuple):
    """Some text of one document, with what `sentences` and the writer must know of it."""
    text: str
    by_line: bool  # every line is a paragraph; else blank lines stand between paragraphs
    fresh: bool    # a sentence begins with this block, rather than going on from the one before
    last: bool     # the document ends with it


def find_files(paths):
    """Files as they are, folders as the files in them, sorted, hidden ones left out. Raises OSError or ValueError."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
        inside = [path] if not path.is_dir() else sorted(
            p for p in path.rglob('*') if p.is_file() and not any(q.startswith('.') for q in p.relative_to(path).parts))
        if not inside:
            raise ValueError(f"folder {path} holds no files: put UTF-8 text files into it")
        found += map(str, inside)
    return found


def read_utf8(path):
    """The text of a file in pieces, line ends as \\n. Raises ValueError naming the offset of the first bad byte."""
    utf8 = codecs.getincrementaldecoder('utf-8-sig')()  # -sig: the mark that some editors write first is not text
    decoder, offset, data = io.IncrementalNewlineDecoder(utf8, translate=True), 0, b'first'
    with open(path, 'rb') as f:
        while data:
            data = f.read(BLOCK)
            offset += len(data)
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as e:  # e.object ends where reading has come to
                raise ValueError(f"{path} is not UTF-8: the byte at offset {offset - len(e.object) + e.start} cannot be "
                                 "read as text. Convert the file, or leave it out") from None


def read_lines(path):
    """(number, line) of every line of a text file, counted from 1."""
    n, rest = 1, ''
    for text in read_utf8(path):
        *lines, rest = (rest + text).split('\n')
        yield from enumerate(lines, n)
        n += len(lines)
    if rest:
        yield n, rest


def safe_pieces(texts):
    """Join and cut an iterable of texts into pieces of about BLOCK characters whose ends are safe."""
    rest = ''
    for text in texts:
        rest += text
        if len(rest) >= BLOCK:
            cut = next((m.start() for m in (p.search(rest) for p in SAFE_CUT) if m), 0)
            if cut or len(rest) >= 16 * BLOCK:  # solid text: read on for a while, then cut anywhere
                yield rest[:cut or len(rest)]
                rest = rest[cut or len(rest):]
    if rest:
        yield rest


def read_rows(path):
    """The `text` of every row of a JSONL file."""
    for n, line in read_lines(path):
        if not line.strip():
            continue
        try:
            text = json.loads(line)['text']
            text.encode()  # JSON can hold half of a surrogate pair, which is not text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f'{path}, line {n}: a row must be JSON with a string "text", such as '
                             f'{{"text": "Once upon a time"}} ({type(e).__name__})') from None
        yield text


def read_documents(path):
    """One file as (text, last) pieces; `last` marks the end of a document."""
    if path.endswith('.jsonl'):
        for text in read_rows(path):
            for piece in safe_pieces([text]):
                yield piece, False
            yield '', True
        return
    for piece in safe_pieces(read_utf8(path)):
        *whole, rest = MARKER.split(piece)
        for text in whole:
            yield text, True
        yield rest, False
    yield '', True


class Survey(NamedTuple):
    """What one look at the whole text has found."""
    characters: int
    alphabet: set
    by_line: dict  # path -> no blank lines in that file
    sha256: str


def survey(files):
    """Read everything once: how much there is, which characters, how paragraphs are set apart."""
    characters, alphabet, by_line, digest = 0, set(), {}, hashlib.sha256()
    for path in files:
        by_line[path] = True
        for text, _ in read_documents(path):
            characters += len(text)
            alphabet |= set(text)
            by_line[path] = by_line[path] and not BLANK.search(text)
            digest.update(text.encode())
            progress(f"reading: {characters / 1e6:,.1f} M characters")
    progress('')
    return Survey(characters, alphabet, by_line, digest.hexdigest())


def read_blocks(files, by_line):
    """The blocks of all files, in order."""
    for path in files:
        before = ''  # the end of what the document has so far
        for text, last in read_documents(path):
            fresh = (not before.strip() or bool(SENTENCE_ENDED.search(before + text[:1]))
                     or (by_line[path] and before.endswith('\n')))
            yield Block(text, by_line[path], fresh, last)
            before = '' if last else (before + text)[-100:]


def split_blocks(blocks, cut):
    """(split, block): the first `cut` characters are for training, what follows is for validation."""
    seen, split, begins = 0, 'train', False
    for block in blocks:
        train, val = block.text[:max(0, cut - seen)], block.text[max(0, cut - seen):]
        seen += len(block.text)
        if train and val:  # the document goes on in the other split: no <|endoftext|> between
            yield 'train', block._replace(text=train, last=False)
            block = block._replace(text=val)
        begins = begins or (bool(val) and split == 'train')  # validation begins with a sentence, be it half of one
        split = 'val' if val else 'train' if train else split  # a block without text ends the document before it
        yield split, block._replace(fresh=block.fresh or begins)
        begins = begins and not block.text.strip()


# A sentence ends at . ! ? 。 ！ ？ before white space, and where a paragraph ends. In bytes, since tokens count bytes.
SPACE = (rb'(?:[\s\x1c-\x1f]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)')
ENDS = rb'(?:[.!?]|\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f)(?=' + SPACE + rb')' + SPACE + rb'*'
LEADING = re.compile(SPACE + rb'*')
SENTENCES = {True: re.compile(ENDS + rb'|\n' + SPACE + rb'*'),
             False: re.compile(ENDS + rb'|\n(?:(?!\n)' + SPACE + rb')*\n' + SPACE + rb'*')}
SENTENCE_ENDED = re.compile(r'[.!?。！？]\s+\S?\Z')


def sentences(block):
    """
    Where sentences begin in a block, as byte offsets; white space belongs to the sentence before.

    >>> sentences(Block('One. Two? 3.14\\n\\nFour', False, True, True))
    [0, 5, 10, 16]
    """
    data = block.text.encode()
    starts = [LEADING.match(data).end()] if block.fresh else []
    starts += [m.end() for m in SENTENCES[block.by_line].finditer(data)]
    return sorted({start for start in starts if start < len(data)})

# -----------------------------------------------------------------------------
# The folder


def parallel(function, items):
    """map(function, items) on all cores, in order, at most one item a core ahead. tiktoken releases Python's lock."""
    n = os.cpu_count() or 1
    with ThreadPoolExecutor(n) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class SplitWriter:
    """Writes one split: NAME.bin and NAME.sentences.npy, as they come, and counts what it has written."""

    def __init__(self, folder, split, dtype):
        self.path, self.dtype = os.path.join(folder, split), np.dtype(dtype)
        self.bin = open(self.path + '.bin', 'wb')
        self.table = open(self.path + '.sentences.npy', 'wb')
        self.counts = {'tokens': 0, 'documents': 0, 'sentences': 0, 'characters': 0, 'bytes': 0}
        self.open = False  # a document has begun
        self.write_header()

    def write_header(self):
        """The header of an .npy file: 128 bytes however many rows there are, so it can be written again at the end."""
        self.table.seek(0)
        np.lib.format.write_array_header_1_0(self.table, {'descr': '<i8', 'fortran_order': False,
                                                          'shape': (self.counts['sentences'], 2)})

    def add(self, ids, starts, block, end_id):
        c = self.counts
        if len(ids):
            self.open = True
            table = np.column_stack([starts + c['tokens'], np.full_like(starts, c['documents'])])
            self.table.write(table.astype('<i8').tobytes())
            self.bin.write(ids.astype(self.dtype).tobytes())
            c['tokens'] += len(ids)
            c['sentences'] += len(starts)
            c['characters'] += len(block.text)
            c['bytes'] += len(block.text.encode())
        if block.last and self.open:
            self.bin.write(np.array([end_id], self.dtype).tobytes())
            c['tokens'] += 1
            c['documents'] += 1
            self.open = False

    def close(self):
        self.counts['documents'] += self.open  # cut in two by the split: it counts on both sides
        self.write_header()
        self.bin.close()
        self.table.close()


def write_text(out_dir, tokenizer, blocks, total, **about):
    """
    (split, block) pairs -> out_dir/train.bin, val.bin, their sentences, tokenizer.json, meta.json. `about` goes into
    meta.json, which is returned. Raises ValueError where a split would be empty.
    """
    dtype = 'uint16' if tokenizer.n_vocab <= 2 ** 16 else 'uint32'  # int16 would turn the ids from 32,768 on negative
    end_id = tokenizer._special_tokens['<|endoftext|>']
    length = np.zeros(tokenizer.n_vocab, np.int64)  # bytes of every token, to find sentences among tokens
    for token, i in tokenizer._mergeable_ranks.items():
        length[i] = len(token)

    def encode_block(item):
        split, block = item
        ids = encode(tokenizer, block.text)
        token_ends = length[ids].cumsum()
        starts = np.unique(np.searchsorted(token_ends, np.array(sentences(block), np.int64), side='right'))
        return split, block, ids, starts

    writers = {split: SplitWriter(out_dir, split, dtype) for split in ('train', 'val')}
    done = 0
    try:
        for split, block, ids, starts in parallel(encode_block, blocks):
            writers[split].add(ids, starts, block, end_id)
            done += len(block.text)
            progress(f"encoding: {done / 1e6:,.1f} of {total / 1e6:,.1f} M characters")
    finally:
        progress('')
        for writer in writers.values():
            writer.close()
    counts = {split: writer.counts for split, writer in writers.items()}
    for split in counts:
        if counts[split]['tokens'] < 2:
            raise ValueError(f"a text of {total:,} characters is too short for a {split} split: add text, change "
                             "--val_fraction, or give --val FILE")
    meta = {'format': 'plainformer data 1', 'task': 'lm', 'tokenizer': tokenizer.name,
            'vocab_size': tokenizer.n_vocab, 'dtype': dtype, 'counts': counts, 'labels': [], **about}
    write_json(os.path.join(out_dir, 'tokenizer.json'), tokenizer_to_dict(tokenizer))
    write_json(os.path.join(out_dir, 'meta.json'), meta)
    return meta


def write_json(path, data):
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(data, f, ensure_ascii=False, indent=1)


def read_json(path):
    """Raises ValueError where the file is not JSON."""
    with open(path, encoding='utf-8') as f:
        try:
            return json.load(f)
        except ValueError as e:
            raise ValueError(f"{path} is damaged ({e}): prepare the data again") from None


@contextlib.contextmanager
def new_folder(path):
    """
    with new_folder(path) as temporary: ... The folder appears under its name when all of it is written, in the place of
    an older data folder; on an error nothing is left. Raises ValueError rather than replace anything else.
    """
    path = os.path.realpath(path)  # a link stays a link
    temporary, old = f'{path}.{os.getpid()}.tmp', f'{path}.{os.getpid()}.old'  # names that nobody else has chosen
    ours = {'meta.json', 'tokenizer.json', 'source.txt'} | {
        f'{split}.{end}' for split in ('train', 'val') for end in ('bin', 'sentences.npy', 'jsonl')}
    if os.path.exists(path) and (not os.path.isdir(path) or set(os.listdir(path)) - ours):
        raise ValueError(f"--out_dir {path} exists and is not a data folder, or holds files of yours: choose another name, "
                         "or move it away")
    os.makedirs(temporary)
    try:
        yield temporary
        if os.path.exists(path):
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if os.path.exists(old):
                os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

# -----------------------------------------------------------------------------
# Built-in data sets: a function that writes one UTF-8 file

UPSTREAM = 'https://raw.githubusercontent.com/'
SHAKESPEARE = ('karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt',
               '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')
TANG = 'chinese-poetry/chinese-poetry/99ebbef7e1345c0985c44b9fd96a3f9e776f117b/%E5%85%A8%E5%94%90%E8%AF%97/poet.tang.{}.json'
TANG_SHA256 = ['4f88f429938082523cdc72a1612bd7a7c3e3f7a33f8192c61ae51340efc3c92d',
               '6e703b8d8dcedbd6110f6d48d043665ca2131db2035a5bfcef5e59a19aeb6d75',
               'ec28efa7e2ae9cdbbba09f0ed186e32ccae47a325ad1e5816b7ad56071c1665a',
               '9e4ba2323752b6b9fbdba875cdbc6a26636fe0cabc85fd066370d4915952001f',
               'b8a7946c879b9658a6c667a4c55f776fae7e5e00a17789ab06b274c1429afc66',
               'a0306e6962cff01639ad9a00b042a201b8dec1f30fa5d768a7b112587889861e',
               '982a21d2b15922b406911f1c825785054314c686da86b2155d7aebb362d22771',
               'a6fb69d7b4343c904dc56ae5aae34facc2478d196b51c37ceba9d1e2f171b342']


def fetch(path, sha256, mirror):
    """
    The bytes at UPSTREAM + path, or below `mirror`, a URL or a folder, instead. Raises ValueError where they cannot be
    had or are not what they should be.
    """
    address = (mirror or UPSTREAM).rstrip('/') + '/' + path
    try:
        if mirror and '://' not in mirror:
            with open(urllib.parse.unquote(address), 'rb') as f:
                data = f.read()
        else:
            progress(f"downloading {address}")
            with urllib.request.urlopen(address, timeout=60) as response:
                data = response.read(1 << 28)
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise ValueError(f"{address} could not be read ({getattr(e, 'reason', None) or e}): go online, or give "
                         "--mirror URL or FOLDER that has it") from None
    progress('')
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{address} is not the expected file: sha256 {found[:12]}… instead of {sha256[:12]}…. "
                         "Try again, or give another --mirror")
    return data


def shakespeare(mirror):
    """1.1 MB of plays, in English."""
    return fetch(*SHAKESPEARE, mirror).decode()


def tang(mirror):
    """8,000 poems of the Tang dynasty, in traditional Chinese: title, lines, blank line."""
    poems = []
    for i, sha256 in enumerate(TANG_SHA256):
        poems += json.loads(fetch(TANG.format(1000 * i), sha256, mirror))
    return '\n'.join('\n'.join([poem['title'], *poem['paragraphs'], '']) for poem in poems)


def pydoc(mirror=None):
    """
    What the Python that runs says of itself: the topics of its manual, and the docstrings of its library, which is
    parsed and never imported. A topic or a module is a document. Sorted by hash, so that any part is like any other.
    """
    from pydoc_data.topics import topics
    documents = [f'{name}\n\n{text.strip()}\n' for name, text in topics.items()]
    library = os.path.dirname(os.__file__)
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(set(folders) - {'site-packages', 'test', 'tests', 'idlelib', 'lib2to3', '__pycache__'})
        for name in names:
            if name.endswith('.py'):
                with open(os.path.join(folder, name), 'rb') as f:
                    documents.append(docstrings(os.path.relpath(os.path.join(folder, name), library), f.read()))
    documents = sorted(filter(None, documents), key=lambda text: hashlib.sha256(text.encode()).digest())
    return '<|endoftext|>\n'.join(documents)


def docstrings(path, source):
    """The documentation of one module as text: its name, then what it, its classes and its functions say. '' if nothing."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ''
    module = path.removesuffix('.py').removesuffix('__init__').strip(os.sep).replace(os.sep, '.')
    found = []

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.append((f'{prefix}{child.name}({ast.unparse(child.args)})', ast.get_docstring(child)))
            elif isinstance(child, ast.ClassDef):
                found.append((f'class {prefix}{child.name}', ast.get_docstring(child)))
                visit(child, f'{prefix}{child.name}.')

    visit(tree, '')
    texts = [f'{title}\n\n{text}\n' for title, text in found if text]
    about = ast.get_docstring(tree)
    return '\n'.join([f'{module}\n' + (f'\n{about}\n' if about else ''), *texts]) if about or texts else ''


DATASETS = {'pydoc': pydoc, 'shakespeare': shakespeare, 'tang': tang}

# -----------------------------------------------------------------------------
# The script


@dataclass
class Settings:
    """The flags of this script."""
    dataset: str = flag('', 'a built-in data set; pydoc needs no network', choices=('', *DATASETS))
    input: list = flag([], 'UTF-8 text files, folders of them, or .jsonl files whose rows have a "text"')
    val: list = flag([], 'the same for the validation split, instead of the end of the text')
    task: str = flag('lm', 'what the data is for', choices=('lm',))
    tokenizer: str = flag('bpe', 'char | byte | bpe | gpt2 | a data folder whose tokenizer is to be used')
    vocab_size: int = flag(4096, 'of bpe: all tokens, special ones included', low=1)
    val_fraction: float = flag(0.1, 'share of the text, at its end, for validation', above=0, below=1)
    out_dir: str = flag('', 'folder to write, data/NAME if not given')
    mirror: str = flag('', 'URL or folder to download from, instead of ' + UPSTREAM)


BPE_SAMPLE = 50_000_000                            # characters that bpe learns from


def choose_tokenizer(settings, alphabet, blocks, cut):
    """The tokenizer that the flags ask for; bpe learns from the training part, spread over it where that is large."""
    name = settings.tokenizer
    if name == 'char':
        return char_tokenizer(alphabet)
    if name == 'byte':
        return byte_tokenizer()
    if name == 'gpt2':
        return gpt2_tokenizer()
    if name != 'bpe':
        folder = name if os.path.isdir(name) else os.path.join('data', name)
        if not os.path.isdir(folder):
            raise ValueError(f"--tokenizer {name}: choose char, byte, bpe, gpt2, or a data folder")
        return load_tokenizer(folder)

    def sample():
        share, seen, taken = min(1.0, BPE_SAMPLE / cut), 0, 0
        for split, block in split_blocks(blocks, cut):
            seen += len(block.text)
            if split == 'train' and taken < share * seen:
                taken += len(block.text)
                progress(f"counting words: {seen / 1e6:,.1f} of {cut / 1e6:,.1f} M characters")
                yield block.text

    return bpe_tokenizer(sample(), settings.vocab_size)


def prepare(settings):
    """Make the data folder that `settings` describes; returns its path and meta. Raises ValueError or OSError."""
    check_flags(settings)
    if bool(settings.dataset) == bool(settings.input):
        raise ValueError("give either --input PATH... or --dataset NAME: "
                         f"{', '.join(DATASETS)}. For a first try: --dataset pydoc")
    name = settings.dataset or os.path.splitext(os.path.basename(os.path.abspath(settings.input[0])))[0]
    out_dir = (settings.out_dir or os.path.join('data', name)).rstrip('/\\')
    with new_folder(out_dir) as folder:
        files, source = settings.input, settings.input
        if settings.dataset:
            files, source = [os.path.join(folder, 'source.txt')], settings.dataset
            with open(files[0], 'w', encoding='utf-8', newline='\n') as f:
                f.write(DATASETS[settings.dataset](settings.mirror))
        files, val_files = find_files(files), find_files(settings.val)
        text = survey(files)
        val_text = survey(val_files)
        if not text.characters:
            raise ValueError(f"{', '.join(files)}: no text in it: give files that hold some")
        cut = text.characters if val_files else int(text.characters * (1 - settings.val_fraction))
        if not cut:
            raise ValueError(f"a text of {text.characters} characters is too short to split: add text")
        blocks = lambda: read_blocks(files, text.by_line)
        val_blocks = split_blocks(read_blocks(val_files, val_text.by_line), 0)
        tokenizer = choose_tokenizer(settings, text.alphabet | val_text.alphabet, blocks(), cut)
        meta = write_text(folder, tokenizer, itertools.chain(split_blocks(blocks(), cut), val_blocks),
                          text.characters + val_text.characters, source=source, sha256=text.sha256)
    return out_dir, meta


def main(argv):
    settings = Settings(**read_flags(argv, __doc__, {'flags': Settings}))
    out_dir, meta = prepare(settings)
    for split, c in meta['counts'].items():
        print(f"{split + ':':6} {c['tokens']:,} tokens, {c['characters']:,} characters, {c['sentences']:,} sentences, "
              f"{c['documents']:,} document{'s' * (c['documents'] != 1)}")
    print(f"{out_dir}: {meta['tokenizer']} tokenizer, vocabulary of {meta['vocab_size']:,}. "
          f"Next: python train.py --dataset {out_dir.removeprefix('data' + os.sep)}")
    if meta['tokenizer'] == 'bpe' and settings.tokenizer == 'bpe' and meta['vocab_size'] < settings.vocab_size:
        print(f"the text has too few repeated pairs for --vocab_size {settings.vocab_size}: no more were joined")


if __name__ == '__main__':
    run(main)
