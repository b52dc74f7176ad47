"""
From text to numbers. A data set becomes a folder of plain files, which train.py reads:

    data/NAME/meta.json             what it is: task, vocabulary, counts, labels, source and its sha256
    data/NAME/tokenizer.json        how text becomes ids and back
    data/NAME/train.bin, val.bin    to pre-train on: one long row of ids (uint16 or uint32); a document ends in <|endoftext|>
    data/NAME/*.sentences.npy       (sentences, 2) int64: the first token and the document of every sentence
    data/NAME/train.jsonl, val.jsonl    to fine-tune on: an example a line, its keys the arguments of a model
    data/NAME/source*.txt           the text of a built-in data set

    python prepare_data.py --dataset pydoc                          Python's own documentation, offline
    python prepare_data.py --input book.txt notes/                  your text: files, folders, JSONL with a `text` field
    python prepare_data.py --task classify --input reviews.tsv      label<TAB>text, or label<TAB>text<TAB>text; or JSONL
    python prepare_data.py --task tag --input entities.conll        a token and its tag a line, a blank line between texts
    python prepare_data.py --task qa --input squad.json             questions, and answers that stand in a context
    python prepare_data.py --task seq2seq --input en-de.tsv         source<TAB>target: translation, summaries, text to text
    python prepare_data.py --show "The import statement"            how a text becomes tokens, step by step

What the other scripts share with this one stands here too, since this is the first that a user runs: flags, errors of
one line, the progress line.

    flag, read_flags, run, progress     the command line
    tokenizers                          char, byte, bpe, gpt2: each is a tiktoken.Encoding; Foreign: those of other models
    read_documents, sentences           text from files, a piece at a time: memory does not grow with the corpus
    write_text                          the folder
    TASKS                               fine-tuning: rows that people have -> examples that a model reads
    pydoc, shakespeare, pytopics, ...   the built-in data sets

References:
    [1] Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword Units, https://arxiv.org/abs/1508.07909
    [2] Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2): byte-level BPE, section 2.2
    [3] Devlin et al. 2018, BERT, https://arxiv.org/abs/1810.04805
    [4] Rajpurkar et al. 2016, SQuAD, https://arxiv.org/abs/1606.05250
"""

import argparse
import ast
import base64
import codecs
import collections
import contextlib
import dataclasses
import difflib
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
import tokenize
import tomllib
import urllib.parse
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
        right = type(value) is rules['kind'] or (rules['kind'] is float and type(value) is int) or value is f.default is None
        if not right:  # settings come from the files of strangers too
            raise ValueError(f"--{f.name} {value!r}: must be a {rules['kind'].__name__}")
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
    given = vars(given)
    for name, value in given.items():
        if isinstance(value, list) and known[name] is not list:  # what argparse makes of --
            raise ValueError(f"--{name} --: is no value")
    return {**read_config(given['config'], known), **given} if given.get('config') else given


def read_config(path, known):
    """The flags {name: value} that stand in a TOML file. Raises ValueError naming the line that is no flag."""
    with open(path, 'rb') as f:
        try:
            values = tomllib.load(f)
        except ValueError as e:  # also where it is not UTF-8
            raise ValueError(f"--config {path} is not TOML: {e}") from None
    for name, value in values.items():
        near = difflib.get_close_matches(name, known, n=1)
        if name not in known or name == 'config':
            raise ValueError(f"--config {path}: unknown flag {name}" + (f", did you mean {near[0]}?" if near else ''))
        try:
            values[name] = value if known[name] is str and isinstance(value, str) else parse_value(known[name], str(value))
        except argparse.ArgumentTypeError as e:
            raise ValueError(f"--config {path}: {name} = {e}") from None
    return values


def write_config(values, notes=()):
    """{name: value} as TOML that `read_config` reads; None is left out: it stands for what is derived."""
    lines = [f'{name} = {json.dumps(value, ensure_ascii=False)}' for name, value in values.items() if value is not None]
    return '\n'.join([*(f'# {note}' for note in notes), *lines]) + '\n'


def run(main):
    """Call main(argv). What the user can mend is one line on standard error and exit status 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(encoding='utf-8', errors='replace')  # whatever the console of Windows prefers
    with contextlib.suppress(ValueError):  # a process that is asked to end cleans up; only a main thread may say so
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError) as e:
        named = isinstance(e, OSError) and e.strerror
        message = f"{f'{e.filename}: ' if e.filename else ''}{e.strerror}" if named else str(e) or "not enough memory"
        progress('')
        print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(message.splitlines())}", file=sys.stderr)
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


def tokenizers_package():
    """Hugging Face's `tokenizers`, which is an extra. Raises ValueError where it is missing."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("the tokenizer of this model needs one more package: pip install tokenizers") from None
    return tokenizers


class Foreign:
    """
    A tokenizer of the package `tokenizers` (WordPiece, SentencePiece, ...) that answers as a tiktoken.Encoding does, as far
    as this project asks. `specials` {text: id} says which of its tokens play our parts: a BERT ends a text with [SEP].
    Raises ValueError where the package is missing or the description is not one.
    """
    name, _mergeable_ranks = 'foreign', {}             # no table from bytes to ids: its tokens are not pieces of the text

    def __init__(self, description, specials):
        tokenizers = tokenizers_package()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(description)
        except BaseException as e:  # what panics in Rust is no Exception
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            raise ValueError(f"the tokenizer is damaged ({str(e)[:80]}): fetch its files again") from None
        self._tokenizer.no_truncation()                # files may hold both: 128 tokens and no more, as many pads as fit
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True   # special tokens written in the text are text like any other
        added = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._special_tokens = added | specials
        self.n_vocab = 1 + max(self._tokenizer.get_vocab().values())
        self._unknown = self._tokenizer.token_to_id(getattr(self._tokenizer.model, 'unk_token', None) or '<unk>')

    def encode_spans(self, text):
        """ids (T,), and where each token stands in the text: (T, 2)."""
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:  # half of a surrogate pair
            raise ValueError(f"this is not valid Unicode text: {text[:40]!r}") from None
        except Exception as e:  # a word without a token, where there is none for the unknown
            raise ValueError(f"{text[:40]!r} cannot be encoded: {e}") from None
        ids = np.array(encoded.ids, np.uint32)
        if self._unknown is not None:  # SentencePiece finds its own special tokens in a text
            ids[np.isin(ids, list(self._special_tokens.values()))] = self._unknown
        return ids, np.array(encoded.offsets, np.int64).reshape(-1, 2)

    def encode_to_numpy(self, text, disallowed_special=()):
        return self.encode_spans(text)[0]

    def decode(self, ids):
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def decode_single_token_bytes(self, i):
        """What a token adds to a text that goes on: a word of WordPiece brings the space before it."""
        token, kind = self._tokenizer.id_to_token(i) or '', type(self._tokenizer.decoder).__name__
        if kind == 'ByteLevel':
            return b''.join(BYTE_OF.get(c, c.encode()) for c in token)
        if kind == 'WordPiece':
            return (token.removeprefix('##') if token.startswith('##') else ' ' + token).encode()
        if re.fullmatch('<0x[0-9A-F]{2}>', token):
            return bytes([int(token[3:5], 16)])
        return token.replace('\u2581', ' ').encode()


# GPT-2 writes bytes as characters that can be seen: those that can stand for themselves, the others from U+0100 on
_SEEN = [*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
BYTE_OF = {chr(b): bytes([b]) for b in _SEEN} | {
    chr(256 + n): bytes([b]) for n, b in enumerate(b for b in range(256) if b not in _SEEN)}


def tiktoken_ranks(vocab, merges, special):
    """
    GPT-2's vocab {token: id} and merges [(a, b)] as tiktoken's table {bytes: id}; None where it could not say the same:
    where a byte has no token, or merges do not come in the order of their ids.
    """
    try:
        ranks = {b''.join(BYTE_OF[c] for c in token): i for token, i in vocab.items() if token not in special}
        made = [vocab[a + b] for a, b in merges]
    except (KeyError, TypeError, ValueError):
        return None
    singles = [ranks.get(bytes([b]), math.inf) for b in range(256)]
    whole = sorted(ranks.values()) == list(range(len(ranks))) and len(made) == len(ranks) - 256
    return ranks if whole and all(a < b for a, b in itertools.pairwise([max(singles), *made])) else None


def huggingface_tokenizer(folder):
    """
    The tokenizer of a Hugging Face folder: GPT-2's vocab and merges through tiktoken, all else through the package
    `tokenizers`. Raises ValueError or OSError.
    """
    try:
        return read_tokenizer(folder)
    except (ValueError, OSError):
        raise
    except Exception as e:  # files of strangers hold anything
        raise ValueError(f"{folder}: its tokenizer is damaged ({type(e).__name__}: {str(e)[:80]!r}): fetch its files "
                         "again") from None


def read_tokenizer(folder):
    path = lambda name: os.path.join(folder, name)
    read = lambda name: read_json(path(name)) if os.path.exists(path(name)) else {}
    about = read('special_tokens_map.json') | read('tokenizer_config.json')
    text = lambda key: about[key].get('content') if isinstance(about.get(key), dict) else about.get(key)
    described, vocab, merges = read('tokenizer.json'), None, None
    if described:
        model = described.get('model') or {}
        cut = {'use_regex': True, **(described.get('pre_tokenizer') or {}), 'trim_offsets': True}
        plain = model.get('type', 'BPE') == 'BPE' and not described.get('normalizer') and cut == {
            'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
        if plain and all(token['special'] for token in described.get('added_tokens', [])) and not (
                model.get('continuing_subword_prefix') or model.get('end_of_word_suffix')):
            vocab = model['vocab']
            merges = [pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges']]
    elif os.path.exists(path('vocab.json')) and os.path.exists(path('merges.txt')):
        vocab = read('vocab.json')
        merges = [line.split(' ') for _, line in read_lines(path('merges.txt')) if line and not line.startswith('#version')]
    special = {token['content']: token['id'] for token in described.get('added_tokens', [])}
    special |= {name: vocab[name] for name in ('<|endoftext|>', text('eos_token')) if vocab and name in vocab}
    ranks = tiktoken_ranks(vocab, merges, special) if vocab else None
    if ranks is not None:
        if text('eos_token') in special:
            special.setdefault('<|endoftext|>', special[text('eos_token')])
        if '<|endoftext|>' not in special:
            raise ValueError(f"{folder}: its tokenizer has no token that ends a text: it needs a tokenizer_config.json with "
                             "an eos_token")
        return make_tokenizer('gpt2', PATTERNS['bpe'], ranks, special)
    if described:
        with open(path('tokenizer.json'), encoding='utf-8') as f:
            description = f.read()
    elif os.path.exists(path('vocab.txt')):
        description = wordpiece(path('vocab.txt'), about)
    elif vocab:
        description = json.dumps(byte_level_json(vocab, merges, special))
    else:
        raise ValueError(f"{folder} has no tokenizer that can be read here: it needs tokenizer.json, vocab.txt, or "
                         "vocab.json with merges.txt")
    tokenizer, first = Foreign(description, {}), read('config.json').get('decoder_start_token_id')
    tokenizer._special_tokens |= parts_played(tokenizer._tokenizer, text) | ({} if first is None else {'<|start|>': first})
    return tokenizer


def wordpiece(path, about):
    """A BERT's vocab.txt, with what its tokenizer_config.json says, as a tokenizer.json."""
    return tokenizers_package().BertWordPieceTokenizer(
        path, lowercase=about.get('do_lower_case', True), strip_accents=about.get('strip_accents'),
        handle_chinese_chars=about.get('tokenize_chinese_chars', True)).to_str()


def parts_played(tokenizer, text):
    """
    {our special token: the id of theirs}. text(key) is what their files call it. `<|start|>`, which only they have, stands
    before a text: Llama's <s>; T5's decoder begins with its padding.
    """
    def find(*names):
        ids = (tokenizer.token_to_id(name) for name in names if isinstance(name, str))
        return next((i for i in ids if i is not None), None)

    end = find(text('eos_token'), '</s>', '<|endoftext|>', text('sep_token'), '[SEP]')
    begin = find(text('bos_token'), '<s>', '<|begin_of_text|>')
    pad = find(text('pad_token'), '[PAD]', '<pad>')
    found = {'<|endoftext|>': end, '<|start|>': begin, '[PAD]': end if pad is None else pad,
             '[CLS]': find(text('cls_token'), '[CLS]'), '[SEP]': find(text('sep_token'), '[SEP]', '</s>'),
             '[MASK]': find(text('mask_token'), '[MASK]')}
    if end is None:
        raise ValueError("the tokenizer has no token that ends a text: its folder needs a tokenizer_config.json with an "
                         "eos_token")
    found |= {f'<extra_{i}>': find(f'<extra_id_{i}>') for i in range(100)}
    if found['<extra_0>'] is not None:
        found['<|start|>'] = pad
    for name, instead in (('[SEP]', end), ('[CLS]', end if begin is None else begin)):
        found[name] = instead if found[name] is None else found[name]
    return {name: i for name, i in found.items() if i is not None}


def tokenizer_to_dict(tokenizer):
    """Plain data, for JSON and for checkpoints."""
    if isinstance(tokenizer, Foreign):
        return {'format': FORMAT, 'name': tokenizer.name, 'specials': tokenizer._special_tokens,
                'description': tokenizer._tokenizer.to_str()}
    ranks = sorted(tokenizer._mergeable_ranks, key=tokenizer._mergeable_ranks.get)
    return {'format': FORMAT, 'name': tokenizer.name, 'pattern': tokenizer._pat_str,
            'specials': tokenizer._special_tokens, 'ranks': [base64.b64encode(token).decode() for token in ranks]}


def tokenizer_from_dict(saved):
    """The inverse. Raises ValueError where `saved` is not such a dict."""
    if not isinstance(saved, dict) or saved.get('format') != FORMAT:
        raise ValueError(f"this is not a tokenizer of this project: its 'format' is not {FORMAT!r}")
    if 'description' in saved and isinstance(saved.get('specials'), dict):
        return Foreign(saved['description'], saved['specials'])
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
    """The tokenizer of a data folder, or of a Hugging Face folder. Raises ValueError or OSError."""
    path = os.path.join(folder, 'tokenizer.json')
    saved = read_json(path) if os.path.exists(path) else {}
    if isinstance(saved, dict) and 'format' in saved:  # ours
        return tokenizer_from_dict(saved)
    if not set(os.listdir(folder)) & {'tokenizer.json', 'vocab.txt', 'vocab.json'}:
        raise FileNotFoundError(f"{folder} holds no tokenizer.json: give a folder that prepare_data.py made")
    return huggingface_tokenizer(folder)


def next_join(ranks, parts):
    """
    (rank, i): an encoder joins parts[i] and parts[i + 1] next, the neighbours whose union was learned first; rank is
    infinite where no two of them are a token.

    >>> next_join({b'a': 0, b'b': 1, b'c': 2, b'bc': 3, b'ab': 4}, [b'a', b'b', b'c'])
    (3, 1)
    """
    return min(((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(itertools.pairwise(parts))),
               default=(math.inf, 0))


def byte_level(tokenizer):
    """(vocab, merges) of a tiktoken table, as GPT-2's files have them: each token is made of two that came before it."""
    character, ranks = {b[0]: c for c, b in BYTE_OF.items()}, tokenizer._mergeable_ranks
    spell = lambda token: ''.join(character[b] for b in token)
    merges = []
    for token, rank in sorted(ranks.items(), key=operator.itemgetter(1)):
        if len(token) > 1:
            parts = [bytes([b]) for b in token]
            while len(parts) > 2:  # join as the encoder would, until two are left
                joined, best = next_join(ranks, parts)
                if joined >= rank:
                    raise ValueError(f"the token {token!r} is not made of two others, so this is no tokenizer of pairs")
                parts[best:best + 2] = [parts[best] + parts[best + 1]]
            merges.append([spell(part) for part in parts])
    return {spell(token): i for token, i in ranks.items()}, merges


def byte_level_json(vocab, merges, special, by_words=True):
    """The tokenizer.json of GPT-2's kind."""
    cut = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': by_words}
    return described_json(special, cut, cut, {
        'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None, 'end_of_word_suffix': None,
        'fuse_unk': False, 'byte_fallback': False, 'vocab': vocab, 'merges': merges})


def described_json(special, pre_tokenizer, decoder, model):
    """What every tokenizer.json holds, with the special tokens {text: id}."""
    return {'version': '1.0', 'truncation': None, 'padding': None, 'normalizer': None, 'post_processor': None,
            'pre_tokenizer': pre_tokenizer, 'decoder': decoder, 'model': model,
            'added_tokens': [{'id': i, 'content': text, 'single_word': False, 'lstrip': False, 'rstrip': False,
                              'normalized': False, 'special': True} for text, i in special.items()]}


def export_tokenizer(tokenizer, vocab_size):
    """{name: data} of tokenizer.json and tokenizer_config.json as transformers reads them, with the ids below vocab_size."""
    special = {text: i for text, i in tokenizer._special_tokens.items() if i < vocab_size}
    if isinstance(tokenizer, Foreign):
        text_of, described = tokenizer._tokenizer.id_to_token, json.loads(tokenizer._tokenizer.to_str())
    else:
        text_of = {i: text for text, i in reversed(special.items())}.get
        if tokenizer.name == 'char':
            cut = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated', 'invert': False}
            described = described_json(special, cut, {'type': 'Fuse'}, {
                'type': 'WordLevel', 'unk_token': '[PAD]',
                'vocab': {c.decode(): i for c, i in tokenizer._mergeable_ranks.items()}})
        else:
            described = byte_level_json(*byte_level(tokenizer), special, by_words=tokenizer.name != 'byte')
    parts = {'eos_token': '<|endoftext|>', 'bos_token': '<|start|>', 'pad_token': '[PAD]', 'cls_token': '[CLS]',
             'sep_token': '[SEP]', 'mask_token': '[MASK]'}
    about = {key: text_of(special[name]) for key, name in parts.items() if name in special}
    return {'tokenizer.json': described, 'tokenizer_config.json': {'tokenizer_class': 'PreTrainedTokenizerFast', **about}}


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


SIGNS = str.maketrans({' ': '␣', '\n': '⏎', '\r': '␍', '\t': '⇥'})


def spell_bytes(data):
    """Bytes to be seen: ␣ for a space, ⏎ for a line end, ‹E6 98› for what is less than a character."""
    text = data.decode('utf-8', 'surrogateescape').translate(SIGNS)
    text = re.sub('[\udc80-\udcff]+', lambda m: f"‹{m[0].encode('utf-8', 'surrogateescape').hex(' ').upper()}›", text)
    return ''.join(c if c.isprintable() else f'‹U+{ord(c):04X}›' for c in text)


def spell_token(tokenizer, i):
    """A token to be seen."""
    names = {i: text for text, i in reversed(tokenizer._special_tokens.items())}
    return names[i] if i in names else spell_bytes(tokenizer.decode_single_token_bytes(i))


def steps_of(tokenizer, text):
    """How a text becomes tokens, as lines: cut into pieces; in each, the neighbours join that were learned first."""
    ids, ranks = encode(tokenizer, text).tolist(), tokenizer._mergeable_ranks
    if tokenizer.name not in ('char', 'byte', 'foreign'):
        for piece in regex.findall(tokenizer._pat_str, text):
            parts, why = [bytes([b]) for b in piece.encode()], 'bytes'
            yield spell_bytes(piece.encode())
            while True:
                yield f"    {' '.join(map(spell_bytes, parts)):<40} {why}"
                rank, i = next_join(ranks, parts)
                if rank == math.inf:
                    break
                why = f'{spell_bytes(parts[i])} + {spell_bytes(parts[i + 1])} = token {rank}'
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
    elif tokenizer.name == 'foreign':
        yield f'a {type(tokenizer._tokenizer.model).__name__} of the package tokenizers, which does not tell its steps'
    yield f"{len(ids):,} tokens: " + ', '.join(f'{spell_token(tokenizer, i)} {i}' for i in ids)

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


def read_rows(path, names=('text',), example='{"text": "Once upon a time"}'):
    """(number, row) of every row of a JSONL file. Each of `names` must be a string in it."""
    for n, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            for name in names:
                row[name].encode()  # JSON can hold half of a surrogate pair, which is not text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f'{path}, line {n}: a row must be JSON with a string "{names[-1]}", such as '
                             f'{example} ({type(e).__name__})') from None
        yield n, row


def read_documents(path):
    """One file as (text, last) pieces; `last` marks the end of a document."""
    if path.endswith('.jsonl'):
        for _, row in read_rows(path):
            for piece in safe_pieces([row['text']]):
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
        if isinstance(tokenizer, Foreign):
            ids, spans = tokenizer.encode_spans(block.text)
            data = np.frombuffer(block.text.encode(), np.uint8)
            character = np.append(np.flatnonzero((data & 0xC0) != 0x80), len(data))  # its first byte: others are 10xxxxxx
            token_ends = character[spans[:, 1]]
        else:
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
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} is damaged ({e}): prepare the data again") from None


@contextlib.contextmanager
def new_folder(path):
    """
    with new_folder(path) as temporary: ... The folder appears under its name when all of it is written, in the place of
    an older data folder; on an error nothing is left. Raises ValueError rather than replace anything else.
    """
    path = os.path.realpath(path)  # a link stays a link
    temporary, old = f'{path}.{os.getpid()}.tmp', f'{path}.{os.getpid()}.old'  # names that nobody else has chosen
    ours = {'meta.json', 'tokenizer.json', 'source.txt', 'source.val.txt'} | {
        f'{split}.{end}' for split in ('train', 'val') for end in ('bin', 'sentences.npy', 'jsonl')}
    if os.path.exists(path) and (not os.path.isdir(path) or set(os.listdir(path)) - ours):
        raise ValueError(f"--out_dir {path} exists and is not a data folder, or holds files of yours: choose another name, "
                         "or move it away")
    beside, fresh = os.path.dirname(path), not os.path.exists(os.path.dirname(path))
    try:
        os.makedirs(temporary)
        yield temporary
        try:
            if os.path.exists(path):
                os.rename(path, old)
            os.rename(temporary, path)
        except BaseException:  # also where the process is told to end just now
            if os.path.exists(old) and not os.path.exists(path):
                os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if fresh:
            with contextlib.suppress(OSError):  # it is not empty: all went well
                os.rmdir(beside)

# -----------------------------------------------------------------------------
# Tasks. A reader turns a file that people have into rows; an encoder turns a row into examples, each a dict whose keys are
# arguments of model.forward(), and `about`, which holds what only scoring needs. A row is a dict of texts, with `where`
# (file and line) for complaints; rows to be answered rather than learned have no label, tags or answers.

IGNORE = -100                                      # a target that is not asked, as in model.py


def is_text(value):
    """A string, and no half of a surrogate pair in it, which JSON can hold."""
    return isinstance(value, str) and not any('\ud800' <= c <= '\udfff' for c in value)


def read_labelled(path):
    """label<TAB>text or label<TAB>text<TAB>second text, or JSONL with "label", "text" and maybe "text_b"."""
    if path.endswith('.jsonl'):
        for n, row in read_rows(path, ('text', 'label'), '{"label": "good", "text": "Once upon a time"}'):
            row = {'where': f'{path}, line {n}', **{key: row[key] for key in ('label', 'text', 'text_b') if key in row}}
            if not is_text(row.get('text_b', '')) or not all(row[key].strip() for key in row):
                raise ValueError(f'{row["where"]}: "label", "text" and "text_b" must be strings that say something')
            yield row | {'label': ' '.join(row['label'].split())}
        return
    for n, line in read_lines(path):
        if not line.strip():
            continue
        fields = line.split('\t')
        if len(fields) not in (2, 3) or not all(field.strip() for field in fields):
            raise ValueError(f"{path}, line {n}: {line[:40]!r} must be label<TAB>text or label<TAB>text<TAB>second text, "
                             f"and has {len(fields)} column{'s' * (len(fields) != 1)}"
                             + (', one of them empty' if len(fields) in (2, 3) else ''))
        fields[0] = ' '.join(fields[0].split())
        yield {'where': f'{path}, line {n}', **dict(zip(('label', 'text', 'text_b'), fields))}


def read_pairs(path):
    """source<TAB>target, or JSONL with "source" and "target". An empty line is an error: it may stand for a lost text."""
    if path.endswith('.jsonl'):
        for n, row in read_rows(path, ('source', 'target'), '{"source": "two", "target": "2"}'):
            if not row['source'].strip() or not row['target'].strip():
                raise ValueError(f'{path}, line {n}: "source" and "target" must be strings that say something')
            yield {'where': f'{path}, line {n}', 'source': row['source'], 'target': row['target']}
        return
    for n, line in read_lines(path):
        fields = line.split('\t')
        if len(fields) != 2 or not all(field.strip() for field in fields):
            raise ValueError(f"{path}, line {n}: {line[:40]!r} must be source<TAB>target, and has "
                             + (f"{len(fields)} column{'s' * (len(fields) != 1)}" if len(fields) != 2 else 'an empty one'))
        yield {'where': f'{path}, line {n}', 'source': fields[0], 'target': fields[1]}


def read_tagged(path):
    """CoNLL: a token a line, its tag (O, B-kind or I-kind) in the last column, a blank line between texts."""
    tokens, tags, columns, first = [], [], None, 1
    for n, line in itertools.chain(read_lines(path), [(None, '')]):
        if not line.strip() or line.startswith('-DOCSTART-'):
            if tokens:
                yield {'where': f'{path}, line {first}', 'tokens': tokens, 'tags': tags}
            tokens, tags = [], []
            continue
        fields = line.split('\t') if '\t' in line else line.split()
        columns = columns or len(fields)
        if len(fields) != columns or columns < 2 or not fields[0] or not re.fullmatch(r'O|[BI]-\S+', fields[-1].strip()):
            raise ValueError(f"{path}, line {n}: {line[:40]!r} must be a token and, in column {max(2, columns)}, its tag: "
                             "O, B-kind where an entity begins, I-kind inside of one")
        first = first if tokens else n
        tokens.append(fields[0])
        tags.append(fields[-1].strip())


def read_questions(path):
    """SQuAD's JSON [4], 1.1 or 2.0: data > paragraphs > context and qas > question, answers > text and answer_start."""
    text = ''.join(read_utf8(path))
    try:
        data = json.loads(text)['data']
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f'{path} must be JSON with a list "data", as SQuAD has it ({type(e).__name__})') from None
    lines = iter([n for n, line in enumerate(text.split('\n'), 1) for _ in re.findall(r'"id"\s*:', line)])
    where = path
    try:
        for paragraph in (p for article in data for p in article['paragraphs']):
            for question in paragraph['qas']:
                where = f"{path}, line {next(lines, 1)} (question {question['id']})"
                answers = [(a['answer_start'], a['text']) for a in question.get('answers', [])]
                row = {'where': where, 'id': question['id'], 'question': question['question'],
                       'context': paragraph['context'], 'answers': answers}
                if not is_text(row['question']) or not is_text(row['context']):
                    raise ValueError(f"{where}: question and context must be strings")
                for start, answer in answers:
                    if type(start) is not int or not is_text(answer):
                        raise ValueError(f"{where}: answer_start {start!r} must be a whole number, and text a string")
                    if not answer.strip() or start < 0 or row['context'][start:start + len(answer)] != answer:
                        found = row['context'][max(0, start):][:max(1, len(answer))]
                        raise ValueError(f"{where}: the answer {answer[:40]!r} does not stand at its answer_start {start}, "
                                         f"where the context has {found[:40]!r}")
                yield row
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{where}: after this place something is not as SQuAD has it ({type(e).__name__}: {e})") from None


CJK = regex.compile(r'[\p{Han}\p{Hiragana}\p{Katakana}]')  # writing without spaces: each character counts as a word


def encode_spans(tokenizer, text):
    """
    text -> ids (T,), and where each token stands in it, (T, 2): text[start:end] holds all characters that the token has a
    part of. A character that several tokens share belongs to each of them. No token goes across the border of a CJK
    character: entities and answers begin and end there.
    """
    if isinstance(tokenizer, Foreign):
        return tokenizer.encode_spans(text)
    ids = [encode(tokenizer, piece) for piece in regex.split(f'({CJK.pattern})', text) if piece]
    ids = np.concatenate(ids) if ids else np.zeros(0, np.uint32)
    ends = np.array([len(tokenizer.decode_single_token_bytes(i)) for i in ids.tolist()], np.int64).cumsum()
    data = np.frombuffer(text.encode(), np.uint8)
    character = ((data & 0xC0) != 0x80).cumsum() - 1   # of every byte; bytes that go on look like 10xxxxxx
    starts = np.append(0, ends)[:-1]
    return ids, np.stack([character[starts], character[ends - 1] + 1], axis=1)


def frame(tokenizer, *texts):
    """
    One or two texts, given as ids, as BERT reads them: section 3 of [3].

        ids         [CLS] the cat sat [SEP] on the mat [SEP]
        segments      0    0   0   0    0   1   1   1    1
    """
    special = tokenizer._special_tokens
    rows = [[special['[CLS]'], *texts[0], special['[SEP]']], *([*text, special['[SEP]']] for text in texts[1:])]
    return [i for row in rows for i in row], [segment for segment, row in enumerate(rows) for _ in row]


def classify_examples(tokenizer, row, labels, block_size):
    """One question about a whole text, or a pair. What is too long loses the end of the longer text."""
    texts = [encode(tokenizer, row[name]).tolist() for name in ('text', 'text_b') if name in row]
    room = block_size - 1 - len(texts)
    for _ in range(max(0, sum(map(len, texts)) - room)):
        max(texts, key=len).pop()
    ids, segments = frame(tokenizer, *texts)
    example = {'ids': ids, 'segments': segments}
    if 'label' in row:
        example['targets'] = labels.index(row['label'])
    return [example | {'about': {name: row[name] for name in ('label', 'text', 'text_b') if name in row}}]


def tag_examples(tokenizer, row, labels, block_size):
    """
    One question a token of the text, asked at its first piece; the other pieces have no target [3, section 5.3]. A text of
    more than block_size tokens is cut into several examples.

        tokens    Angela       Merkel       spoke
        ids       Ang  ela     Mer  kel     spoke
        targets   B-person .   I-person .   O           a dot is IGNORE
    """
    tokens = row['tokens']
    ids, spans = encode_spans(tokenizer, ' '.join(tokens))
    starts = np.cumsum([0, *(len(token) + 1 for token in tokens)])
    first = np.searchsorted(spans[:, 1], starts[:-1], side='right')  # the piece that holds a token's first character
    ends = [*(first[1:]), len(ids)]
    examples, begin = [], 0
    while begin < len(tokens):
        stop = begin + 1
        while stop < len(tokens) and ends[stop] - first[begin] <= block_size - 2:
            stop += 1
        part, _ = frame(tokenizer, ids[first[begin]:ends[stop - 1]][:block_size - 2].tolist())
        where = (first[begin:stop] - first[begin] + 1).tolist()
        example = {'ids': part, 'about': {'tokens': tokens[begin:stop], 'where': where}}
        if 'tags' in row:
            example['targets'] = [IGNORE] * len(part)
            example['about']['tags'] = row['tags'][begin:stop]
            for at, tag in zip(where, row['tags'][begin:stop]):
                example['targets'][at] = labels.index(tag)
        examples.append(example)
        begin = stop
    return examples


def tokens_of(spans, start, stop):
    """The first and the last token of text[start:stop]. Its last characters may have none: some tokenizers drop accents."""
    first, last = np.searchsorted(spans[:, 1], [start, stop - 1], side='right')
    return np.array([first, min(last, np.searchsorted(spans[:, 0], stop) - 1)])


def qa_examples(tokenizer, row, labels, block_size):
    """
    Where in the context does the answer stand? `[CLS] question [SEP] window [SEP]`: a long context is cut into windows that
    overlap by half, each an example. targets: where the answer's first and last token stand, [CLS] where the window does not
    hold it. about: the window's text as context, its place in the whole as start, its first token as first, and where each
    token stands in it as offsets.
    """
    question = encode(tokenizer, row['question']).tolist()[:block_size // 2]
    context, room = row['context'], block_size - 3 - len(question)
    ids, spans = encode_spans(tokenizer, context)
    held = None                                        # the first and last token of the answer
    holds = lambda begin: held is not None and begin <= held[0] and held[1] < begin + room
    if row.get('answers'):
        start, text = row['answers'][0]
        stop = start + len(text)
        held = tokens_of(spans, start, stop)
        if context[spans[held[0], 0]:spans[held[1], 1]].strip() != text.strip():  # it begins or ends inside of a token
            pieces = [(0, start), (start, stop), (stop, len(context))]
            encoded = [encode_spans(tokenizer, context[a:b]) for a, b in pieces]
            ids = np.concatenate([part for part, _ in encoded])
            spans = np.concatenate([where + a for (a, _), (_, where) in zip(pieces, encoded)])
            held = tokens_of(spans, start, stop)
        if held[1] - held[0] >= room:
            raise ValueError(f"the answer {text[:40]!r} has {held[1] - held[0] + 1} tokens, more than a "
                             f"window of block_size={block_size} holds beside its question: prepare (and train) with a "
                             "larger --block_size, or leave the question out")
    begins = [*range(0, max(0, len(ids) - room), max(1, room // 2)), max(0, len(ids) - room)]
    if held is not None and not any(map(holds, begins)):
        begins.append(int(held[0]))
    examples = []
    for begin in sorted(set(begins)):
        window, offsets = ids[begin:begin + room].tolist(), spans[begin:begin + room]
        low, high = (int(offsets[0, 0]), int(offsets[-1, 1])) if window else (0, 0)
        framed, segments = frame(tokenizer, question, window)
        about = {'question': row['question'], 'context': context[low:high], 'start': low, 'first': len(question) + 2,
                 'offsets': (offsets - low).tolist()}
        example = {'ids': framed, 'segments': segments, 'about': about}
        if 'answers' in row:
            example['targets'] = (held - begin + about['first']).tolist() if holds(begin) else [0, 0]
            about |= {'id': row['id'], 'answers': [text for _, text in row['answers']]}
        examples.append(example)
    return examples


def seq2seq_examples(tokenizer, row, labels, block_size):
    """
    A text in, a text out. The decoder begins with <|endoftext|> and is to end with it.

        ids            twenty one <|endoftext|>
        decoder_ids    <|endoftext|> 2 1
        targets        2 1 <|endoftext|>
    """
    end_id, example = tokenizer._special_tokens['<|endoftext|>'], {}
    start_id = tokenizer._special_tokens.get('<|start|>', end_id)
    for name in ('source', 'target'):
        if name in row:
            ids = [*encode(tokenizer, row[name]).tolist(), end_id]
            if len(ids) > block_size:
                raise ValueError(f"the {name} {row[name][:40]!r} has {len(ids)} tokens with its end, more than block_size="
                                 f"{block_size}: shorten it, or prepare (and train) with a larger --block_size")
            example |= {'ids': ids} if name == 'source' else {'decoder_ids': [start_id, *ids[:-1]], 'targets': ids}
    return [example | {'about': {name: row[name] for name in ('source', 'target') if name in row}}]


class Task(NamedTuple):
    """How one kind of fine-tuning data is read."""
    read: Callable      # path -> rows
    texts: Callable     # row -> its texts, which a tokenizer may learn from
    asked: Callable     # row -> the labels that it has
    labels: Callable    # the labels of all rows -> those to choose from, in order
    examples: Callable  # (tokenizer, row, labels, block_size) -> examples


def tag_labels(asked):
    """O, and for each kind B-kind and I-kind, seen or not."""
    return ['O', *(prefix + kind for kind in sorted({tag[2:] for tag in asked if tag != 'O'}) for prefix in ('B-', 'I-'))]


TASKS = {
    'classify': Task(read_labelled, lambda row: [row[name] for name in ('text', 'text_b') if name in row],
                     lambda row: [row['label']], sorted, classify_examples),
    'tag': Task(read_tagged, lambda row: [' '.join(row['tokens'])], lambda row: row['tags'], tag_labels, tag_examples),
    'qa': Task(read_questions, lambda row: [row['question'], row['context']],
               lambda row: [] if row['answers'] else ['no answer'], sorted, qa_examples),
    'seq2seq': Task(read_pairs, lambda row: [row['source'], row['target']], lambda row: [], sorted, seq2seq_examples),
}


def split_rows(rows, val_fraction):
    """
    Shuffle, the same way every time, and cut: (train rows, val rows). Questions about one context stay together, or
    validation would ask about texts that were learned by heart.
    """
    groups = collections.defaultdict(list)
    for i, row in enumerate(rows):
        groups[row.get('context', i)].append(row)
    groups, train = list(groups.values()), []
    order = np.random.default_rng(0).permutation(len(groups)).tolist()
    while order and len(train) + len(groups[order[0]]) <= len(rows) * (1 - val_fraction):
        train += groups[order.pop(0)]
    return train, [row for i in order for row in groups[i]]


def check_labels(task, rows, labels):
    """Raise ValueError, naming file and line, at the first row with a label that is not among `labels`."""
    for row in rows:
        if task != 'qa' and (unknown := set(TASKS[task].asked(row)).difference(labels)):
            raise ValueError(f"{row['where']}: the label {min(unknown)!r} is unknown: the training data has "
                             f"{', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}")


def encode_rows(tokenizer, task, rows, labels, block_size):
    """The examples of all rows, in order; about's row tells of which. Raises ValueError, naming file and line."""
    examples = []
    for i, row in enumerate(rows):
        try:
            made = TASKS[task].examples(tokenizer, row, labels, block_size)
        except ValueError as e:
            raise ValueError(f"{row['where']}: {e}" if 'where' in row else str(e)) from None
        for example in made:
            example['about']['row'] = i
        examples += made
    return examples


def write_examples(out_dir, task, tokenizer, splits, labels, block_size, **about):
    """splits {split: rows} -> out_dir/train.jsonl, val.jsonl, tokenizer.json, meta.json; returns the meta."""
    counts = {}
    for split, rows in splits.items():
        c = counts[split] = {'rows': len(rows), 'examples': 0, 'tokens': 0, 'full': 0,
                               'bytes': sum(len(text.encode()) for row in rows for text in TASKS[task].texts(row))}
        with open(os.path.join(out_dir, f'{split}.jsonl'), 'w', encoding='utf-8', newline='\n') as f:
            for example in encode_rows(tokenizer, task, rows, labels, block_size):
                f.write(json.dumps(example, ensure_ascii=False) + '\n')
                c['examples'] += 1
                c['tokens'] += len(example['ids'])
                c['full'] += len(example['ids']) == block_size
                progress(f"encoding: row {example['about']['row'] + 1:,} of {len(rows):,} of {split}")
    progress('')
    meta = {'format': 'plainformer data 1', 'task': task, 'tokenizer': tokenizer.name, 'vocab_size': tokenizer.n_vocab,
            'counts': counts, 'labels': labels, 'block_size': block_size, **about}
    write_json(os.path.join(out_dir, 'tokenizer.json'), tokenizer_to_dict(tokenizer))
    write_json(os.path.join(out_dir, 'meta.json'), meta)
    return meta


def prepare_task(settings, task, folder, files, val_files, source):
    """Rows of labelled data -> a data folder; returns its meta. Raises ValueError naming file and line."""
    rows, val_rows = ([row for path in paths for row in TASKS[task].read(path)] for paths in (files, val_files))
    train_rows = rows
    if not val_files:
        train_rows, val_rows = split_rows(rows, settings.val_fraction)
    for split, found in (('train', train_rows), ('val', val_rows)):
        if not found:
            raise ValueError(f"{', '.join(files if split == 'train' else val_files or files)}: no rows for a {split} split: "
                             "give more" + ("" if val_files else ", or change --val_fraction"))
    labels = TASKS[task].labels({label for row in rows for label in TASKS[task].asked(row)})
    if task in ('classify', 'tag') and len(labels) < 2:
        raise ValueError(f"{', '.join(files)}: all rows have the label {labels[0]!r}: give rows of at least two labels")
    check_labels(task, val_rows, labels)
    texts = lambda rows: (text for row in rows for text in TASKS[task].texts(row))
    alphabet = set().union(*texts(rows), *texts(val_rows))
    unique = dict.fromkeys(texts(train_rows))          # one context has many questions
    tokenizer = choose_tokenizer(settings, alphabet, unique)
    digests = {}
    for name, paths in (('sha256', files), ('val_sha256', val_files)):
        digest = hashlib.sha256()
        for path in paths:
            with open(path, 'rb') as f:
                digest.update(f.read())
        digests |= {name: digest.hexdigest()} if paths else {}
    return write_examples(folder, task, tokenizer, {'train': train_rows, 'val': val_rows}, labels, settings.block_size,
                          source=source, **digests)

# -----------------------------------------------------------------------------
# Built-in data sets: functions that return a text, or one for training and one for validation

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
ROTTEN_TOMATOES = {
    'positive': ('yoonkim/CNN_sentence/23e0e1f7355705bb083043fda05c031b15acb38c/rt-polarity.pos',
                 '2da124ec187a9d5a29c9f04e91c540e02baed5af8868f550a26bd6fd4dbf8bf0'),
    'negative': ('yoonkim/CNN_sentence/23e0e1f7355705bb083043fda05c031b15acb38c/rt-polarity.neg',
                 '4ace77d558c3714723843f1d65b60c01e3417b208180f0728808d76ad0eeeaca'),
}
MULTI30K = 'multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw/{}.{}.gz'
MULTI30K_SHA256 = {('train', 'en'): 'd79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f',
                   ('train', 'de'): '726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6',
                   ('val', 'en'): '14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28',
                   ('val', 'de'): 'f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a'}
WNUT17 = [('leondz/emerging_entities_17/e52a2d2a71ac1a051ca2d532eef28653c5c02603/wnut17train.conll',
           '731820e13f71af324c6b55a1575ec2ce59fbaa2a0806f8f0400b98d56cd6a7a5'),
          ('leondz/emerging_entities_17/e52a2d2a71ac1a051ca2d532eef28653c5c02603/emerging.dev.conll',
           'e053b752b8155113ca66e7db08af5f2f5f43ab993694e4774f1ec5bad42312d8')]


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
    for path, source in library():
        module, *found = docstrings(path, source) or ['']
        if found:
            (_, about), *rest = found
            documents.append('\n'.join([f'{module}\n' + (f'\n{about}\n' if about else ''),
                                        *(f'{title}\n\n{text}\n' for title, text in rest)]))
    return '<|endoftext|>\n'.join(by_hash(documents))


def by_hash(texts):
    """In an order that is the same everywhere and has nothing to do with what the texts say."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def library():
    """(path, source) of the modules of Python's own library, as bytes. They are read and never imported."""
    root = os.path.dirname(os.__file__)
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - {'site-packages', 'test', 'tests', 'idlelib', 'lib2to3', '__pycache__'})
        for name in sorted(names):
            if name.endswith('.py'):
                with open(os.path.join(folder, name), 'rb') as f:
                    yield os.path.relpath(os.path.join(folder, name), root), f.read()


def docstrings(path, source):
    """[module, (title, docstring), ...]: what a module says of itself (first, maybe None), its classes and its functions."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
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
    found, about = [(title, text) for title, text in found if text], ast.get_docstring(tree)
    return [module, (module, about), *found] if about or found else []


def pytopics(mirror=None):
    """Which part of Python's library is this docstring from? The twelve packages that say most; label<TAB>text."""
    said = collections.defaultdict(set)
    for path, source in library():
        module, *found = docstrings(path, source) or ['']
        texts = (' '.join(text.split()) for _, text in found if text)
        said[module.split('.')[0]].update(text for text in texts if len(text) >= 20)
    most = sorted(said, key=lambda package: (-len(said[package]), package))[:12]
    return '\n'.join(by_hash(f'{package}\t{text}' for package in most for text in said[package])) + '\n'


def pytokens(mirror=None):
    """
    What is each word of Python source: keyword, name, number, string, comment, or O for an operator? A logical line is a
    text; strings and comments of several words are entities of several tokens. CoNLL, 12,000 lines of Python's library.
    """
    lines = set()
    for _, source in library():
        row = []
        with contextlib.suppress(tokenize.TokenError, SyntaxError, UnicodeDecodeError):
            for token in tokenize.tokenize(io.BytesIO(source).readline):
                kind = tokenize.tok_name[token.type].lower()
                kind = 'string' if kind.startswith('fstring') else 'keyword' if keyword.iskeyword(token.string) else kind
                if kind in ('keyword', 'name', 'number', 'string', 'comment', 'op'):
                    words = token.string.split()
                    row += [f"{word}\t{'O' if kind == 'op' else ('I-' if i else 'B-') + kind}"
                            for i, word in enumerate(words)]
                elif kind == 'newline' or (kind == 'nl' and row and row[0].endswith('-comment')):
                    lines.add('\n'.join(row[:32]) + '\n')
                    row = []
    return '\n'.join(by_hash(lines)[:12_000])


ONES = ['', *'one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen '
        'eighteen nineteen'.split()]
TENS = ['', '', *'twenty thirty forty fifty sixty seventy eighty ninety'.split()]


def in_words(n):
    """
    >>> in_words(1_021_100)
    'one million twenty-one thousand one hundred'
    """
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + ('-' + ONES[n % 10] if n % 10 else '')
    for size, name in ((1_000_000, 'million'), (1000, 'thousand'), (100, 'hundred')):
        if n >= size:
            return f'{in_words(n // size)} {name} {in_words(n % size)}'.rstrip()


def numbers(mirror=None):
    """Number words to digits: all below 1,000, and of each length up to six digits about as many; source<TAB>target."""
    rng, chosen = random.Random(0), set(range(1, 1000))
    while len(chosen) < 20_000:
        chosen.add(rng.randrange(1, 10 ** rng.randint(4, 6)))
    return '\n'.join(by_hash(f'{in_words(n)}\t{n}' for n in chosen)) + '\n'


SHOTS = 30                                         # pairs in a document of recall


def recall(mirror=None):
    """
    Learning in context: the rule stands only in the text. In every document 8 letters stand for a digit each, anew every
    time, and 30 of those pairs follow each other: k7a2k7x0a2... A letter that was shown before tells its digit; a model can
    know that only by looking it up. 40,000 documents to train, 1,000 to validate.
    """
    rng, texts = random.Random(0), []
    for n in (40_000, 1000):
        documents = []
        for _ in range(n):
            pairs = [f'{letter}{rng.randrange(10)}' for letter in rng.sample(string.ascii_lowercase, 8)]
            documents.append(''.join(rng.choices(pairs, k=SHOTS)) + '\n')
        texts.append('<|endoftext|>\n'.join(documents))
    return tuple(texts)


def multi30k(mirror):
    """29,000 captions of pictures, English to German (Elliott et al. 2016), and 1,014 to validate; source<TAB>target."""
    texts = []
    for split in ('train', 'val'):
        sides = [gzip.decompress(fetch(MULTI30K.format(split, language), MULTI30K_SHA256[split, language], mirror)).decode()
                 for language in ('en', 'de')]
        rows = zip(*(side.rstrip('\n').split('\n') for side in sides), strict=True)
        texts.append('\n'.join('\t'.join(' '.join(text.split()) for text in row) for row in rows) + '\n')
    return tuple(texts)


def rotten_tomatoes(mirror):
    """10,662 sentences of film reviews, good or bad (Pang and Lee 2005), 80 % to train, 10 % to validate; label<TAB>text."""
    rows = [f'{label}\t{line.strip()}' for label, (path, sha256) in ROTTEN_TOMATOES.items()
            for line in fetch(path, sha256, mirror).decode('cp1252').split('\n') if line.strip()]
    random.Random(0).shuffle(rows)
    train, val = int(0.8 * len(rows)), int(0.9 * len(rows))  # the rest is for tests
    return '\n'.join(rows[:train]) + '\n', '\n'.join(rows[train:val]) + '\n'


def wnut17(mirror):
    """Persons, places and products in tweets (Derczynski et al. 2017); CoNLL. Rare names: those of val are not in train."""
    return tuple(fetch(path, sha256, mirror).decode() for path, sha256 in WNUT17)


DATASETS = {  # what each is for, and the function
    'pydoc': ('lm', pydoc), 'recall': ('lm', recall), 'shakespeare': ('lm', shakespeare), 'tang': ('lm', tang),
    'pytopics': ('classify', pytopics), 'rotten_tomatoes': ('classify', rotten_tomatoes),
    'pytokens': ('tag', pytokens), 'wnut17': ('tag', wnut17),
    'numbers': ('seq2seq', numbers), 'multi30k': ('seq2seq', multi30k),
}

# -----------------------------------------------------------------------------
# The script


@dataclass
class Settings:
    """The flags of this script."""
    dataset: str = flag('', 'a built-in data set; pydoc needs no network', choices=('', *DATASETS))
    input: list = flag([], 'UTF-8 text files, folders of them, or .jsonl files whose rows have a "text"')
    val: list = flag([], 'the same for the validation split, instead of the end of the text')
    task: str = flag('', 'what the data is for: lm to pre-train, the others to fine-tune [lm, or that of the data set]',
                     choices=('', 'lm', *TASKS))
    tokenizer: str = flag('bpe', 'char | byte | bpe | gpt2 | a data or Hugging Face folder whose tokenizer is to be used')
    vocab_size: int = flag(4096, 'of bpe: all tokens, special ones included', low=1)
    val_fraction: float = flag(0.1, 'share for validation: the end of the text; of a task any rows', above=0, below=1)
    block_size: int = flag(64, 'of a task: longest example, in tokens; what is longer is cut, or makes several', low=8)
    out_dir: str = flag('', 'folder to write, data/NAME if not given')
    show: str = flag('', 'a text: print how it becomes tokens, step by step, and do nothing else')
    mirror: str = flag('', 'URL or folder to download from, instead of ' + UPSTREAM)


BPE_SAMPLE = 50_000_000                            # characters that bpe learns from


def choose_tokenizer(settings, alphabet, texts):
    """The tokenizer that the flags ask for; bpe learns from an iterable of texts."""
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
    return bpe_tokenizer(texts, settings.vocab_size)


def training_sample(blocks, cut):
    """The training part of a text; where that is large, BPE_SAMPLE characters of it, spread evenly."""
    share, seen, taken = min(1.0, BPE_SAMPLE / cut), 0, 0
    for split, block in split_blocks(blocks, cut):
        seen += len(block.text)
        if split == 'train' and taken < share * seen:
            taken += len(block.text)
            progress(f"counting words: {seen / 1e6:,.1f} of {cut / 1e6:,.1f} M characters")
            yield block.text


def prepare_text(settings, folder, files, val_files, source):
    """Text -> a data folder to pre-train on; returns its meta. Raises ValueError."""
    text, val_text = survey(files), survey(val_files)
    if not text.characters:
        raise ValueError(f"{', '.join(files)}: no text in it: give files that hold some")
    cut = text.characters if val_files else int(text.characters * (1 - settings.val_fraction))
    if not cut:
        raise ValueError(f"a text of {text.characters} characters is too short to split: add text")
    blocks = lambda: read_blocks(files, text.by_line)
    val_blocks = split_blocks(read_blocks(val_files, val_text.by_line), 0)
    tokenizer = choose_tokenizer(settings, text.alphabet | val_text.alphabet, training_sample(blocks(), cut))
    return write_text(folder, tokenizer, itertools.chain(split_blocks(blocks(), cut), val_blocks),
                      text.characters + val_text.characters, source=source, sha256=text.sha256,
                      **({'val_sha256': val_text.sha256} if val_files else {}))


def prepare(settings):
    """Make the data folder that `settings` describes; returns its path and meta. Raises ValueError or OSError."""
    check_flags(settings)
    if bool(settings.dataset) == bool(settings.input):
        raise ValueError("give either --input PATH... or --dataset NAME: "
                         f"{', '.join(DATASETS)}. For a first try: --dataset pydoc")
    name = settings.dataset or os.path.splitext(os.path.basename(os.path.abspath(settings.input[0])))[0]
    out_dir = (settings.out_dir or os.path.join('data', name)).rstrip('/\\')
    task = settings.task or (DATASETS[settings.dataset][0] if settings.dataset else 'lm')
    if settings.dataset and task != DATASETS[settings.dataset][0]:
        raise ValueError(f"--task {task}: {settings.dataset} is for {DATASETS[settings.dataset][0]}: leave the flag out")
    with new_folder(out_dir) as folder:
        files, val_files, source = settings.input, settings.val, settings.input
        if settings.dataset:
            texts, source = DATASETS[settings.dataset][1](settings.mirror), settings.dataset
            paths = []
            for name, text in zip(('source.txt', 'source.val.txt'), (texts,) if isinstance(texts, str) else texts):
                paths.append(os.path.join(folder, name))
                with open(paths[-1], 'w', encoding='utf-8', newline='\n') as f:
                    f.write(text)
            files, val_files = paths[:1], val_files or paths[1:]
        files, val_files = find_files(files), find_files(val_files)
        if task == 'lm':
            meta = prepare_text(settings, folder, files, val_files, source)
        else:
            meta = prepare_task(settings, task, folder, files, val_files, source)
    return out_dir, meta


def show(settings):
    """Print how --show becomes tokens. A bpe must have learned: it is that of a data set that was prepared."""
    check_flags(settings)
    name = settings.tokenizer
    if name == 'bpe':
        name = settings.out_dir or os.path.join('data', settings.dataset or 'pydoc')
        if not os.path.exists(os.path.join(name, 'tokenizer.json')):
            raise ValueError(f"--show: there is no {name}/tokenizer.json, and bpe has to learn from a text: prepare data "
                             "first, such as --dataset pydoc, or choose --tokenizer gpt2, byte or FOLDER")
    tokenizer = choose_tokenizer(dataclasses.replace(settings, tokenizer=name), set(settings.show), [])
    print(*steps_of(tokenizer, settings.show), sep='\n')


def main(argv):
    settings = Settings(**read_flags(argv, __doc__, {'flags': Settings}))
    if settings.show:
        return show(settings)
    out_dir, meta = prepare(settings)
    for split, c in meta['counts'].items():
        rest = ('characters', 'sentences', 'documents') if meta['task'] == 'lm' else ('rows', 'examples')
        print(f"{split + ':':6} "
              + ', '.join(f"{c[name]:,} {name[:-1] if c[name] == 1 else name}" for name in ('tokens', *rest)))
    if meta['labels']:
        print(f"labels: {', '.join(meta['labels'])}")
    if meta['task'] == 'classify' and (full := sum(c['full'] for c in meta['counts'].values())):
        print(f"{full:,} examples are as long as --block_size {meta['block_size']} tokens allows: their text may be cut")
    print(f"{out_dir}: {meta['tokenizer']} tokenizer, vocabulary of {meta['vocab_size']:,}. "
          f"Next: python train.py --dataset {out_dir.removeprefix('data' + os.sep)}")
    if meta['tokenizer'] == 'bpe' and settings.tokenizer == 'bpe' and meta['vocab_size'] < settings.vocab_size:
        print(f"the text has too few repeated pairs for --vocab_size {settings.vocab_size}: no more were joined")


if __name__ == '__main__':
    run(main)
