"""
Promises of prepare_data.py: text becomes ids and comes back unchanged, however it is cut into blocks; documents and
sentences are where a reader sees them; what the user can mend is one clear line, and nothing is lost or left behind.

    tokenizers      round trips, the bpe against one that counts from scratch, damage
    reading         UTF-8, JSONL, files and folders
    blocks          documents, sentences and splits against a reference that walks over the text
    the folder      meta.json, id sizes, replacement, memory
    errors          through prepare() and through the command line
    fine-tuning     where tokens stand in a text, examples of each task, rows as people have them, splits, malformed rows
    data sets       downloads, tang, pydoc, pytopics, pytokens
    flags           spelling, bounds, the progress line
"""

import collections
import dataclasses
import doctest
import functools
import gzip
import hashlib
import http.server
import inspect
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import regex
import torch
from conftest import ROOT, command
from hypothesis import example, given, settings
from hypothesis import strategies as st

import model
import prepare_data
from prepare_data import TASKS, Settings, encode, flag, prepare, read_flags, tokenizer_from_dict, tokenizer_to_dict

classify_examples, tag_examples, qa_examples = (TASKS[task].examples for task in ('classify', 'tag', 'qa'))

SAMPLE = 'It was the best of times, it was the worst. 床前明月光，疑是地上霜。 Les élèves rêvent 😀😀, cafe\u0301! ' * 3
HUGE = 1 << 20


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv('no_proxy', '*')


@pytest.fixture(scope='module')
def bpe():
    return prepare_data.bpe_tokenizer([SAMPLE], 500)


@pytest.fixture(scope='module')
def gpt2(shared):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(shared / 'tiktoken_cache'))
        return prepare_data.gpt2_tokenizer()


def write(path, text):
    """A file with exactly these bytes, or this text in UTF-8 with its line ends as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def read(folder, split):
    """What train.py sees of a split: (ids, rows of the sentence table), as lists."""
    dtype = json.loads((folder / 'meta.json').read_bytes())['dtype']
    return (np.fromfile(folder / f'{split}.bin', dtype).tolist(), np.load(folder / f'{split}.sentences.npy').tolist())


def contents(folder):
    """Every file below a folder with its bytes: two folders are equal if these are."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


# -----------------------------------------------------------------------------
# Tokenizers


@given(st.text())
@example('Hello, 世界! 😀 cafe\u0301\r\n\t\x00 <|endoftext|>[PAD]')
@example('aaaa' * 50 + '👩\u200d👩\u200d👧 \u3000\ufeff')
def test_any_text_comes_back_from_char_byte_and_bpe(bpe, text):
    """encode and decode are inverse for the tokenizers we make, whatever the text."""
    for tokenizer in (prepare_data.char_tokenizer(set(text) | {'x'}), prepare_data.byte_tokenizer(), bpe):
        ids = encode(tokenizer, text)
        assert ids.dtype == np.uint32 and ids.ndim == 1
        assert tokenizer.decode(ids.tolist()) == text, f'{tokenizer.name}: {ids.tolist()}'
        assert not {*ids.tolist()} & {*tokenizer._special_tokens.values()}, f'{tokenizer.name}: text became a special token'


@given(st.text())
@example('Hello, 世界! 😀 cafe\u0301 <|endoftext|>[PAD]')
def test_any_text_comes_back_from_gpt2(gpt2, text):
    """The same for GPT-2's table with our special tokens behind it."""
    assert gpt2.decode(encode(gpt2, text).tolist()) == text


def test_gpt2_is_the_published_one_with_our_special_tokens_behind(gpt2):
    """The ids of GPT-2's own tokens are OpenAI's: weights depend on them."""
    assert encode(gpt2, 'Hello world').tolist() == [15496, 995]
    assert gpt2._special_tokens['<|endoftext|>'] == 50256 and gpt2.n_vocab == 50257 + 104, gpt2.n_vocab
    assert min(i for text, i in gpt2._special_tokens.items() if text != '<|endoftext|>') == 50257


def test_gpt2_without_a_network_names_what_helps(monkeypatch):
    """No download and no cache: a ValueError that names the remedies."""
    def offline(name):
        raise ConnectionError('no route to host')
    monkeypatch.setattr(prepare_data.tiktoken, 'get_encoding', offline)
    with pytest.raises(ValueError, match=r'TIKTOKEN_CACHE_DIR.*--tokenizer bpe'):
        prepare_data.gpt2_tokenizer()


def test_char_and_byte_ids_are_the_obvious_ones():
    """char: rank in the sorted alphabet. byte: the byte."""
    assert encode(prepare_data.char_tokenizer('世ba'), 'ab世a').tolist() == [0, 1, 2, 0]
    assert encode(prepare_data.byte_tokenizer(), 'a世').tolist() == [97, 0xE4, 0xB8, 0x96]


def test_special_tokens_have_ids_of_their_own_behind_the_text(bpe):
    """Nothing shares an id, and vocab_size is the highest id and one more."""
    for tokenizer in (prepare_data.char_tokenizer('ab世'), prepare_data.byte_tokenizer(), bpe):
        text_ids, special_ids = sorted(tokenizer._mergeable_ranks.values()), sorted(tokenizer._special_tokens.values())
        assert text_ids + special_ids == list(range(tokenizer.n_vocab)), f'{tokenizer.name}: {text_ids[-3:]}, {special_ids}'
        assert [*tokenizer._special_tokens] == prepare_data.SPECIALS


@pytest.mark.parametrize('vocab_size', [361, 362, 370, 400])
def test_a_bpe_vocabulary_counts_everything(vocab_size):
    """vocab_size includes bytes and special tokens; where the text has enough pairs, it is reached exactly."""
    assert prepare_data.bpe_tokenizer([SAMPLE], vocab_size).n_vocab == vocab_size


def test_a_bpe_vocabulary_below_the_least_is_refused():
    """256 bytes and 105 special tokens need 361 ids: the message says so."""
    with pytest.raises(ValueError, match=r'--vocab_size 360.*at least 361'):
        prepare_data.bpe_tokenizer([SAMPLE], 360)


def joined(tokens, pair):
    """[a, b, c, a, b], (a, b) -> [ab, c, ab]"""
    out, at = [], 0
    while at < len(tokens):
        size = 2 if tuple(tokens[at:at + 2]) == pair else 1
        out.append(b''.join(tokens[at:at + size]))
        at += size
    return out


def slow_bpe(counts, n_tokens):
    """The merges of learn_bpe, all pairs counted from scratch each time."""
    pieces, merges = {piece: [bytes([b]) for b in piece.encode()] for piece in counts}, []
    while 256 + len(merges) < n_tokens:
        pairs = collections.Counter()
        for piece, tokens in pieces.items():
            for pair in zip(tokens, tokens[1:]):
                pairs[pair] += counts[piece]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        pieces = {piece: joined(tokens, best) for piece, tokens in pieces.items()}
    return merges


@settings(max_examples=100)
@given(st.sampled_from(['a', 'ab', 'abc ', 'é。a ']).flatmap(lambda few: st.text(few, max_size=120)), st.integers(256, 300),
       st.text('ab c', max_size=40))
@example('aaaa aaaa aaa', 300, 'aaaaaaa')                  # neighbours overlap
@example('ab ba ab ba', 300, 'abba')                       # equals: the smaller bytes first
def test_learn_bpe_is_the_slow_one_and_tiktoken_applies_its_merges_in_order(text, n_tokens, other):
    """The fast learner equals counting from scratch, and the table encodes as the merges do by hand."""
    find = regex.compile(prepare_data.PATTERNS['bpe']).findall
    merges = slow_bpe(collections.Counter(find(text)), n_tokens)
    ranks = prepare_data.learn_bpe(collections.Counter(find(text)), n_tokens)
    assert list(ranks) == [bytes([b]) for b in range(256)] + [a + b for a, b in merges], (list(ranks)[256:], merges)
    assert list(ranks.values()) == list(range(len(ranks)))
    tokenizer = prepare_data.make_tokenizer('bpe', prepare_data.PATTERNS['bpe'], ranks)
    for piece in find(text + other):
        tokens = [bytes([b]) for b in piece.encode()]
        for pair in merges:
            tokens = joined(tokens, pair)
        by_tiktoken = tokenizer.decode_tokens_bytes(encode(tokenizer, piece).tolist())
        assert by_tiktoken == tokens, f'{piece!r}: {by_tiktoken} instead of {tokens}'


def test_learn_bpe_stops_where_nothing_occurs_twice():
    """A worked example: `ab` occurs 3 times, then `abc` twice; `ca` once, and a token for that is a waste."""
    assert list(prepare_data.learn_bpe({'abca': 1, 'abc': 1, 'abd': 1}, 1000))[256:] == [b'ab', b'abc']
    assert len(prepare_data.learn_bpe({'ab': 5}, 256)) == 256, 'n_tokens must hold'


@pytest.mark.parametrize('make', [lambda: prepare_data.char_tokenizer('ab世😀\n'), prepare_data.byte_tokenizer,
                                  lambda: prepare_data.bpe_tokenizer([SAMPLE], 420)], ids=['char', 'byte', 'bpe'])
def test_a_tokenizer_survives_json(make):
    """to_dict, JSON, from_dict is the identity: name, pattern, table, special tokens, ids."""
    tokenizer = make()
    saved = tokenizer_to_dict(tokenizer)
    again = tokenizer_from_dict(json.loads(json.dumps(saved)))
    assert tokenizer_to_dict(again) == saved
    assert (again.name, again._pat_str, again.n_vocab) == (tokenizer.name, tokenizer._pat_str, tokenizer.n_vocab)
    assert again._mergeable_ranks == tokenizer._mergeable_ranks and again._special_tokens == tokenizer._special_tokens
    assert encode(again, 'ab世😀\nab').tolist() == encode(tokenizer, 'ab世😀\nab').tolist()


ALL = {text: 2 + i for i, text in enumerate(prepare_data.SPECIALS)}  # behind the two tokens of an alphabet `ab`
DAMAGED = {
    'no format': {'format': None}, 'another format': {'format': 'plainformer tokenizer 0'}, 'no table': {'ranks': None},
    'a table of numbers': {'ranks': [5]}, 'an empty table': {'ranks': []}, 'a table that is text': {'ranks': 'YQ=='},
    'a token twice': {'ranks': ['YQ==', 'YQ==']}, 'not base64': {'ranks': ['!!', 'YQ==']},
    'half a pattern': {'pattern': '('}, 'no pattern': {'pattern': None}, 'no special tokens': {'specials': None},
    'special tokens without ids': {'specials': [*ALL]}, 'an id that is text': {'specials': {**ALL, '[PAD]': 'y'}},
    'an id below 0': {'specials': {**ALL, '[PAD]': -1}}, 'the id of a text token': {'specials': {**ALL, '[PAD]': 0}},
    'an id twice': {'specials': {**ALL, '[PAD]': 2}}, 'no <|endoftext|>': {'specials': {'[PAD]': 2}},
}


@pytest.mark.parametrize('name', DAMAGED)
def test_a_damaged_tokenizer_is_refused(name):
    """Not a KeyError, not a panic, and never a tokenizer that means something else."""
    saved = tokenizer_to_dict(prepare_data.char_tokenizer('ab'))
    assert saved['specials'] == ALL
    with pytest.raises(ValueError, match='tokenizer'):
        tokenizer_from_dict(saved | DAMAGED[name])


@pytest.mark.parametrize('missing', ['format', 'name', 'pattern', 'specials', 'ranks'])
def test_a_tokenizer_without_one_of_its_parts_is_refused(missing):
    """Nor may anything else than a dict come in."""
    saved = tokenizer_to_dict(prepare_data.byte_tokenizer())
    del saved[missing]
    for damaged in (saved, [saved], None, 'tokenizer'):
        with pytest.raises(ValueError, match='tokenizer'):
            tokenizer_from_dict(damaged)


@given(st.text('abc', max_size=30), st.sampled_from('z世😀\u0301'), st.text('abcz', max_size=5))
def test_an_unknown_character_is_named_with_its_place(before, unknown, after):
    """tiktoken would panic; here it is one sentence with the character and where it stands."""
    with pytest.raises(ValueError) as error:
        encode(prepare_data.char_tokenizer('abc'), before + unknown + after)
    assert f'{unknown!r} (character {len(before) + 1} of ' in str(error.value), error.value


def test_half_of_a_surrogate_pair_is_not_text(bpe):
    """A ValueError that says so, from every tokenizer."""
    for tokenizer in (prepare_data.char_tokenizer('ab'), prepare_data.byte_tokenizer(), bpe):
        with pytest.raises(ValueError, match=r'never seen|not valid Unicode'):
            encode(tokenizer, 'a\ud800b')


def test_a_folder_gives_its_tokenizer(tmp_path):
    """--tokenizer FOLDER encodes with the same table; characters it lacks are named; other folders are refused."""
    first, second = write(tmp_path / 'first.txt', 'abc abc abc abc'), write(tmp_path / 'second.txt', 'cab cab cab cab')
    prepare(Settings(input=[first], tokenizer='char', out_dir=str(tmp_path / 'one')))
    prepare(Settings(input=[second], tokenizer=str(tmp_path / 'one'), out_dir=str(tmp_path / 'two')))
    assert (tmp_path / 'one/tokenizer.json').read_bytes() == (tmp_path / 'two/tokenizer.json').read_bytes()
    with pytest.raises(ValueError, match="never seen '世'"):
        prepare(Settings(input=[write(tmp_path / 'third.txt', '世 cab cab')], tokenizer=str(tmp_path / 'one'),
                         out_dir=str(tmp_path / 'three')))
    with pytest.raises(FileNotFoundError, match=r'holds no tokenizer\.json'):
        prepare_data.load_tokenizer(tmp_path)
    assert not (tmp_path / 'three').exists()


def test_bpe_learns_from_the_training_part_alone(tmp_path):
    """Pairs that only validation has must not become tokens: that would leak."""
    prepare(Settings(input=[write(tmp_path / 'a.txt', 'ab ' * 300 + 'xy ' * 100)], val_fraction=0.25,
                     out_dir=str(tmp_path / 'out'), vocab_size=370))
    ranks = prepare_data.load_tokenizer(tmp_path / 'out')._mergeable_ranks
    assert b'ab' in ranks and b'xy' not in ranks, list(ranks)[256:]


def test_bpe_learns_from_a_sample_spread_over_a_large_text(tmp_path, monkeypatch):
    """At most BPE_SAMPLE characters and a block, and the end of the training part is among them."""
    monkeypatch.setattr(prepare_data, 'BLOCK', 500)
    monkeypatch.setattr(prepare_data, 'BPE_SAMPLE', 5000)
    seen = []

    def learn(texts, vocab_size):
        seen.extend(texts)
        return prepare_data.byte_tokenizer()

    monkeypatch.setattr(prepare_data, 'bpe_tokenizer', learn)
    lines = [f'line {i:04}' for i in range(4000)]
    prepare(Settings(input=[write(tmp_path / 'a.txt', '\n'.join(lines))], out_dir=str(tmp_path / 'out')))
    taken = [int(line[5:]) for line in ''.join(seen).splitlines() if regex.fullmatch(r'line \d{4}', line)]
    assert 4500 <= sum(map(len, seen)) <= 5500, f'{sum(map(len, seen))} characters of a sample of 5000'
    quarters = [sum(low <= n < low + 900 for n in taken) for low in range(0, 3600, 900)]
    assert min(quarters) > 50, f'lines of each quarter: {quarters}'

# -----------------------------------------------------------------------------
# Reading


@settings(max_examples=150)
@given(st.lists(st.sampled_from([b'a', b'b\n', b'\r', b'\r\n', *(c.encode() for c in ('世', '😀', 'e\u0301', '\ufeff')),
                                 b'\xff', b'\xe4\xb8', b'\xf0\x9f\x98', b'\xc0\xaf', b'\xed\xa0\x80']), max_size=12),
       st.integers(1, 9))
@example(['世界'.encode(), b'\xe4\xb8'], 4)                 # cut short at the end of the file
@example([b'a' * 20, b'\xff', b'b'], 4)                    # far behind the first read
def test_reading_in_pieces_is_reading_at_once(tmp_path, chunks, block):
    """However a file is read, the text is the same, and so is the offset of its first bad byte."""
    data = b''.join(chunks)
    path = write(tmp_path / 'a.txt', data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, 'BLOCK', block)
        try:
            expected = data.decode('utf-8').removeprefix('\ufeff').replace('\r\n', '\n').replace('\r', '\n')
        except UnicodeDecodeError as e:
            with pytest.raises(ValueError, match=rf'a\.txt is not UTF-8: the byte at offset {e.start} '):
                ''.join(prepare_data.read_utf8(path))
        else:
            assert ''.join(prepare_data.read_utf8(path)) == expected


def test_jsonl_rows_are_documents(tmp_path):
    """Each row's text is one; blank lines between rows are none; a marker inside of a row is text."""
    rows = ['Once upon\na time', '', '世界 😀', 'x\n<|endoftext|>\ny\r\n']
    path = write(tmp_path / 'rows.jsonl', '\n\n'.join(json.dumps({'text': text, 'id': 1}) for text in rows))
    pieces = list(prepare_data.read_documents(path))
    assert [text for text, last in pieces if text] == [text for text in rows if text]
    assert [last for text, last in pieces] == [False, True, True, False, True, False, True], pieces


def test_a_folder_gives_its_files_in_order_without_the_hidden_ones(tmp_path):
    """Sorted, all levels, and neither .git/config nor .hidden."""
    for name in ('b.txt', 'a/z.txt', 'a/.git/x', '.git/config', '.hidden', 'c/d/e.jsonl'):
        write(tmp_path / name, 'text')
    found = prepare_data.find_files([str(tmp_path)])
    assert [os.path.relpath(f, tmp_path).replace(os.sep, '/') for f in found] == ['a/z.txt', 'b.txt', 'c/d/e.jsonl']
    assert prepare_data.find_files([str(tmp_path / 'b.txt'), str(tmp_path / 'c')]) == [found[1], found[2]]

# -----------------------------------------------------------------------------
# Blocks, documents, sentences, splits


def by_hand(documents, by_line, cut):
    """
    What byte_tokenizer's folder must hold, found by a walk over the characters: {split: (ids, rows of the table)}. A
    sentence begins at the first character of a document or of the validation split, after a sign that ends one and white
    space, and after the end of a paragraph.
    """
    ids, table, seen = {'train': [], 'val': []}, {'train': [], 'val': []}, 0
    for document in documents:
        before = gap = ''                                  # the last character, and the white space behind it
        for c in document:
            split = 'train' if seen < cut else 'val'
            if seen == cut:
                before = gap = ''
            if c.isspace():
                gap += c
            else:
                lines = gap.count('\n')
                if not before or (gap and before in '.!?。！？') or lines >= (1 if by_line else 2):
                    table[split].append([len(ids[split]), ids[split].count(256)])
                before, gap = c, ''
            ids[split] += c.encode()
            seen += 1
        if document:
            ids[split].append(256)
    return {split: (ids[split], table[split]) for split in ids}


WORDS = ['a', 'bc', '3.14', 'No.', 'Yes!', 'why?', '你好', '对。', '什么？', '好！', '😀', 'cafe\u0301', "it's", '...']
LINES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(' '.join)


def texts_of(between):
    """Lists of documents whose lines have `between` between them; the text of a document ends in a line end."""
    lines = st.lists(LINES | LINES.map('a <|endoftext|> {}'.format), min_size=1, max_size=7)
    return st.lists(st.just('') | lines.map(lambda lines: between.join(lines) + '\n'), min_size=2, max_size=6).filter(any)


@settings(max_examples=120)
@given(st.sampled_from(['\n', '\n', '\n\n', '\n \n', '\n\n\n']).flatmap(lambda b: st.tuples(st.just(b), texts_of(b))),
       st.sampled_from([HUGE, 48, 49, 64, 100]), st.floats(0.05, 0.95))
def test_documents_sentences_and_splits_are_where_a_reader_sees_them(tmp_path, drawn, block, val_fraction):
    """A file of documents, cut once by characters, equals the walk over its text, whatever the size of a block."""
    between, documents = drawn
    text = '<|endoftext|>\n'.join(documents)
    n = sum(map(len, documents))
    cut = int(n * (1 - val_fraction))
    by_line = between == '\n' or all(len(d.splitlines()) <= 1 for d in documents)
    expected = by_hand(documents, by_line, cut)
    if min(len(ids) for ids, _ in expected.values()) < 2:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, 'BLOCK', block)
        _, meta = prepare(Settings(input=[write(tmp_path / 'a.txt', text)], tokenizer='byte', val_fraction=val_fraction,
                                   out_dir=str(tmp_path / 'out')))
    for split, (ids, table) in expected.items():
        found = read(tmp_path / 'out', split)
        assert found[0] == ids, f'{split}: {bytes(i for i in found[0] if i < 256).decode(errors="replace")!r}'
        assert found[1] == table, f'{split} of {text!r} cut at {cut}: rows {found[1]}, not {table}'
        assert meta['counts'][split] == {
            'tokens': len(ids), 'sentences': len(table), 'documents': ids.count(256) + (ids[-1] != 256),
            'bytes': len(ids) - ids.count(256), 'characters': cut if split == 'train' else n - cut}


@settings(max_examples=40)
@given(st.sampled_from(['\n', '\n\n']).flatmap(texts_of), st.integers(48, 120), st.sampled_from(['char', 'byte', 'bpe']))
def test_cutting_into_blocks_changes_nothing(tmp_path, documents, block, tokenizer):
    """Ids, sentences, counts and the learned table are exactly those of one huge block, and the text comes back."""
    path = write(tmp_path / 'a.txt', '<|endoftext|>\n'.join(documents))
    if sum(map(len, documents)) < 6:
        return
    for size, name in ((HUGE, 'one'), (block, 'many')):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare_data, 'BLOCK', size)
            prepare(Settings(input=[path], tokenizer=tokenizer, vocab_size=400, val_fraction=0.3,
                             out_dir=str(tmp_path / name)))
    one, many = contents(tmp_path / 'one'), contents(tmp_path / 'many')
    different = [name for name in one | many if one.get(name) != many.get(name)]
    assert not different, {name: (one.get(name), many.get(name)) for name in different}
    table = prepare_data.load_tokenizer(tmp_path / 'one')
    ids = read(tmp_path / 'one', 'train')[0] + read(tmp_path / 'one', 'val')[0]
    end_id = table._special_tokens['<|endoftext|>']
    assert table.decode([i for i in ids if i != end_id]) == ''.join(documents)
    assert ids.count(end_id) == sum(map(bool, documents)) and ids[-1] == end_id


# Texts in which a block could end in a bad place: (text, size of a block)
BAD_CUTS = {
    'white space before a blank line': ('foo bar \n\nbaz qux' + ' xyz' * 9, 8),
    'white space at the end of a line': ('foo bar \nbaz qux' + ' xyz' * 9, 8),
    'a marker with text behind it is text': ('<|endoftext|> foo bar' + ' xyz' * 9, 14),
    'blank lines, no spaces, markers': ('你好\n\n世界\n\n<|endoftext|>\n\n你好啊\n\n世界好\n\n' * 4, 30),
    'blank lines, no spaces': ('你好。\n\n世界\n\n' * 20, 10),
    'a wide space behind a narrow one': ('一。 \u3000二三四 五六七 八九', 3),
    'a sign without white space behind it': ('12.34!56' * 20, 51),
}


@pytest.mark.parametrize('name, tokenizer', [(name, 'byte') for name in BAD_CUTS] + [('blank lines, no spaces', 'bpe')])
def test_a_block_never_ends_in_a_bad_place(tmp_path, monkeypatch, name, tokenizer):
    """Where lines do not help, a block must not part a marker, a blank line or a sentence from what it belongs to."""
    text, block = BAD_CUTS[name]
    path = write(tmp_path / 'a.txt', text)
    for size, out in ((HUGE, 'one'), (block, 'many')):
        monkeypatch.setattr(prepare_data, 'BLOCK', size)
        prepare(Settings(input=[path], tokenizer=tokenizer, vocab_size=400, out_dir=str(tmp_path / out)))
    for split in ('train', 'val'):
        one, many = read(tmp_path / 'one', split), read(tmp_path / 'many', split)
        assert one == many, f'{split}: one block {one}, many {many}'


def test_validation_that_begins_with_a_line_end_begins_with_a_sentence(tmp_path, monkeypatch):
    """The cut falls before the last character of a block, a line end: what follows still begins a sentence."""
    text, cut = 'ab cd\n\nef gh\nij kl mn op qr', 12
    monkeypatch.setattr(prepare_data, 'BLOCK', 16)         # the first block is text[:13]
    _, meta = prepare(Settings(input=[write(tmp_path / 'a.txt', text)], tokenizer='byte', out_dir=str(tmp_path / 'out'),
                               val_fraction=1 - (cut + 0.5) / len(text)))
    assert meta['counts']['train']['characters'] == cut
    assert read(tmp_path / 'out', 'val') == by_hand([text], False, cut)['val']


@settings(max_examples=15)
@given(st.sampled_from(['\n', '\n\n']).flatmap(texts_of))
def test_rows_of_the_table_point_at_the_token_with_the_first_character(tmp_path, documents):
    """char and bpe mark the very sentences that byte marks, and document numbers grow."""
    text = '<|endoftext|>\n'.join(documents)
    path = write(tmp_path / 'a.txt', text)
    if sum(map(len, documents)) < 6:
        return
    for name in ('byte', 'char', 'bpe'):
        prepare(Settings(input=[path], tokenizer=name, vocab_size=420, val_fraction=0.3, out_dir=str(tmp_path / name)))
    for split in ('train', 'val'):
        rows = read(tmp_path / 'byte', split)[1]
        assert [number for _, number in rows] == sorted(number for _, number in rows)
        for name in ('char', 'bpe'):
            tokenizer = prepare_data.load_tokenizer(tmp_path / name)
            ids, table = read(tmp_path / name, split)
            token_of_byte = []
            for i, token in enumerate(ids):
                special = token in tokenizer._special_tokens.values()
                token_of_byte += [i] * (1 if special else len(tokenizer.decode_single_token_bytes(token)))
            expected = [[token_of_byte[start], number] for start, number in rows]
            assert table == expected, f'{name}, {split} of {text!r}: {table}, not {expected}'


@pytest.mark.parametrize('text, by_line, expected', [
    ('One. Two! Three? Four', False, ['One. ', 'Two! ', 'Three? ', 'Four']),
    ('It is 3.14 and v1.2.3 so.\tNext', False, ['It is 3.14 and v1.2.3 so.\t', 'Next']),
    ('我来。 你呢？ 走！\n好', False, ['我来。 ', '你呢？ ', '走！\n', '好']),
    ('我来。你呢？走', False, ['我来。你呢？走']),                    # no white space: as designed, one sentence
    ('我来。\u3000你呢', False, ['我来。\u3000', '你呢']),             # the space of Chinese
    ('One\ntwo\n\nthree\n \t\nfour', False, ['One\ntwo\n\n', 'three\n \t\n', 'four']),
    ('one\ntwo\n  three', True, ['one\n', 'two\n  ', 'three']),
    ('Wait...  what?! Yes.', False, ['Wait...  ', 'what?! ', 'Yes.']),
    ('  One. ', False, ['One. ']),
    (' \n ', False, []),
    ('', True, []),
    ('一\n\u3000\n二', False, ['一\n\u3000\n', '二']),                # a blank line that holds white space is blank
    ('one\n\xa0\ntwo', False, ['one\n\xa0\n', 'two']),
    ('\u3000\u3000一二。 三', False, ['一二。 ', '三']),               # an indented first paragraph
    ('Oui.\xa0Non', False, ['Oui.\xa0', 'Non']),                   # white space that does not break a line
])
def test_sentences_end_at_signs_before_white_space_and_at_paragraphs(text, by_line, expected):
    """Cut at the offsets, a text falls into its sentences, each with the white space behind it."""
    starts = prepare_data.sentences(prepare_data.Block(text, by_line, True, True))
    data = text.encode()
    assert [data[a:b].decode(errors='replace') for a, b in zip(starts, [*starts[1:], len(data)])] == expected, starts


def test_a_sentence_that_goes_on_from_the_block_before_does_not_begin_anew():
    """fresh=False: the first word of a block continues."""
    assert prepare_data.sentences(prepare_data.Block('and on. New', False, False, True)) == [8]


@pytest.mark.parametrize('text, sentences', [('a b\nc d\ne f\n', 3), ('a b\nc d\n\ne f\n', 2), ('a b\nc d\n \ne f\n', 2)])
def test_lines_are_paragraphs_only_in_a_file_without_blank_lines(tmp_path, text, sentences):
    """One blank line anywhere in the file, and line ends are nothing special."""
    prepare(Settings(input=[write(tmp_path / 'a.txt', text)], val=[write(tmp_path / 'v.txt', 'x y')], tokenizer='byte',
                     out_dir=str(tmp_path / 'out')))
    assert len(read(tmp_path / 'out', 'train')[1]) == sentences


def test_files_folders_rows_and_markers_begin_documents(tmp_path):
    """Each ends in exactly one <|endoftext|>; blank lines and empty documents insert nothing."""
    inputs = [write(tmp_path / 'one.txt', 'a\n\n\nb\n<|endoftext|>\n<|endoftext|>\nc <|endoftext|>\n  <|endoftext|>\nd'),
              str(tmp_path / 'folder'), write(tmp_path / 'rows.jsonl', '{"text": "g"}\n{"text": ""}\n{"text": "h"}\n')]
    write(tmp_path / 'folder/1.txt', 'e\n<|endoftext|>')     # no line end behind the marker
    write(tmp_path / 'folder/2.txt', 'f')
    write(tmp_path / 'folder/3.txt', '')
    _, meta = prepare(Settings(input=inputs, val=[write(tmp_path / 'v.txt', 'v\r\nw')], tokenizer='byte',
                               out_dir=str(tmp_path / 'out')))
    text = prepare_data.load_tokenizer(tmp_path / 'out').decode(read(tmp_path / 'out', 'train')[0])
    assert text == ('a\n\n\nb\n<|endoftext|>c <|endoftext|>\n  <|endoftext|>\nd<|endoftext|>e\n<|endoftext|>f<|endoftext|>'
                    'g<|endoftext|>h<|endoftext|>')
    ids, table = read(tmp_path / 'out', 'train')
    assert ids.count(256) == meta['counts']['train']['documents'] == 6, meta['counts']['train']
    assert sorted({number for _, number in table}) == list(range(6)), table
    assert read(tmp_path / 'out', 'val')[0] == [*b'v\nw', 256], 'line ends become \\n'


def test_the_split_is_one_cut_and_puts_no_end_there(tmp_path):
    """The last val_fraction of the characters, counted over all files; the document goes on in both."""
    files = [write(tmp_path / 'a.txt', '世界' * 10), write(tmp_path / 'b.txt', 'abcde' * 4)]
    _, meta = prepare(Settings(input=files, tokenizer='char', val_fraction=0.25, out_dir=str(tmp_path / 'out')))
    decode = prepare_data.load_tokenizer(tmp_path / 'out').decode
    assert decode(read(tmp_path / 'out', 'train')[0]) == '世界' * 10 + '<|endoftext|>' + 'abcde' * 2
    assert decode(read(tmp_path / 'out', 'val')[0]) == 'abcde' * 2 + '<|endoftext|>'
    assert [meta['counts'][split]['documents'] for split in ('train', 'val')] == [2, 1], 'on both sides of the cut'


def test_a_cut_between_two_documents_leaves_each_whole(tmp_path):
    """The document before the cut ends in training, also where the file goes on with a marker."""
    prepare(Settings(input=[write(tmp_path / 'a.txt', 'abcd\n<|endoftext|>\nefgh\n')], tokenizer='byte', val_fraction=0.5,
                     out_dir=str(tmp_path / 'out')))
    assert read(tmp_path / 'out', 'train') == ([*b'abcd\n', 256], [[0, 0]])
    assert read(tmp_path / 'out', 'val') == ([*b'efgh\n', 256], [[0, 0]])


def test_files_for_validation_leave_all_the_rest_for_training(tmp_path):
    """--val FILE overrides --val_fraction; the alphabet of char is made from both."""
    prepare(Settings(input=[write(tmp_path / 'a.txt', 'abc' * 9)], val=[write(tmp_path / 'v.txt', 'z世')], tokenizer='char',
                     val_fraction=0.5, out_dir=str(tmp_path / 'out')))
    decode = prepare_data.load_tokenizer(tmp_path / 'out').decode
    assert decode(read(tmp_path / 'out', 'train')[0]) == 'abc' * 9 + '<|endoftext|>'
    assert decode(read(tmp_path / 'out', 'val')[0]) == 'z世<|endoftext|>'

# -----------------------------------------------------------------------------
# The folder


@pytest.mark.parametrize('vocab_size, dtype', [(65535, 'uint16'), (65536, 'uint16'), (65537, 'uint32'), (100_000, 'uint32')])
def test_ids_fit_their_file(tmp_path, vocab_size, dtype):
    """No id wraps around, neither at 2^15 nor at 2^16: all come back, the highest too."""
    # b6: int16 made negative ids, and uint16 cut those of a vocabulary above 65,536
    n = vocab_size - len(prepare_data.SPECIALS)
    characters = [chr(i) for i in range(0x10000, 0x10000 + n)]
    specials = {text: vocab_size - 1 - i for i, text in enumerate(prepare_data.SPECIALS)}  # <|endoftext|> is the highest
    tokenizer = prepare_data.make_tokenizer('char', prepare_data.PATTERNS['char'],
                                            {c.encode(): i for i, c in enumerate(characters)}, specials)
    assert tokenizer.n_vocab == vocab_size
    write(tmp_path / 'big/tokenizer.json', json.dumps(tokenizer_to_dict(tokenizer)))
    ids = [0, 1, 32767, 32768, n - 2, n - 1]
    path = write(tmp_path / 'a.txt', ''.join(characters[i] for i in ids))
    _, meta = prepare(Settings(input=[path], val=[path], tokenizer=str(tmp_path / 'big'), out_dir=str(tmp_path / 'out')))
    assert (meta['dtype'], meta['vocab_size']) == (dtype, vocab_size)
    for split in ('train', 'val'):
        assert read(tmp_path / 'out', split)[0] == ids + [vocab_size - 1]
        assert os.path.getsize(tmp_path / f'out/{split}.bin') == 7 * np.dtype(dtype).itemsize


def test_meta_tells_the_truth(tmp_path):
    """Counts, source, sha256 of the text and dtype in meta.json are those of the files beside it, and all is UTF-8."""
    text = 'Das Größte? 世界。 Ja.\n' * 20
    path = write(tmp_path / 'größe.txt', text.replace('\n', '\r\n'))
    out, meta = prepare(Settings(input=[path], tokenizer='char', out_dir=str(tmp_path / 'out')))
    assert out == str(tmp_path / 'out') and json.loads((tmp_path / 'out/meta.json').read_text('utf-8')) == meta
    assert {key: meta[key] for key in ('task', 'tokenizer', 'dtype', 'labels', 'source', 'sha256')} == {
        'task': 'lm', 'tokenizer': 'char', 'dtype': 'uint16', 'labels': [], 'source': [path],
        'sha256': hashlib.sha256(text.encode()).hexdigest()}
    assert meta['vocab_size'] == len(set(text)) + len(prepare_data.SPECIALS)
    for split, part in (('train', text[:len(text) * 9 // 10]), ('val', text[len(text) * 9 // 10:])):
        ids, table = read(tmp_path / 'out', split)
        counts = {'tokens': len(ids), 'documents': 1, 'sentences': len(table), 'characters': len(part),
                  'bytes': len(part.encode())}
        assert meta['counts'][split] == counts
    assert sorted(contents(tmp_path / 'out')) == [
        'meta.json', 'tokenizer.json', 'train.bin', 'train.sentences.npy', 'val.bin', 'val.sentences.npy']


def test_the_folder_has_the_name_of_its_source(tmp_path, monkeypatch):
    """data/NAME below the working folder, NAME from the first input."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'notes/a.txt', 'some words ' * 9)
    write(tmp_path / 'book.txt', 'some words ' * 9)
    for path, name in (('book.txt', 'book'), ('notes/', 'notes')):
        assert prepare(Settings(input=[path], tokenizer='byte'))[0] == os.path.join('data', name)
        assert (tmp_path / 'data' / name / 'meta.json').exists()


def test_preparing_again_replaces_the_whole_folder(tmp_path):
    """Nothing of the old data set remains, and nothing lies beside it."""
    write(tmp_path / 'out/meta.json', '{}')
    write(tmp_path / 'out/train.jsonl', 'old')
    prepare(Settings(input=[write(tmp_path / 'a.txt', 'abc' * 20)], tokenizer='byte', out_dir=str(tmp_path / 'out')))
    assert 'train.jsonl' not in contents(tmp_path / 'out') and sorted(os.listdir(tmp_path)) == ['a.txt', 'out']


@pytest.mark.parametrize('inside', ['thesis.txt', None], ids=['a folder of other things', 'a file'])
def test_what_is_not_a_data_folder_is_never_replaced(tmp_path, inside):
    """A slip in --out_dir must not cost a thesis."""
    write(tmp_path / 'out' / inside if inside else tmp_path / 'out', 'years of work')
    source = write(tmp_path / 'a.txt', 'abc' * 20)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r'--out_dir .*out exists and is not a data folder'):
        prepare(Settings(input=[source], tokenizer='byte', out_dir=str(tmp_path / 'out')))
    assert contents(tmp_path) == before


def test_an_empty_folder_may_be_filled(tmp_path):
    """There is nothing in it to lose."""
    (tmp_path / 'out').mkdir()
    prepare(Settings(input=[write(tmp_path / 'a.txt', 'abc' * 20)], tokenizer='byte', out_dir=str(tmp_path / 'out') + '/'))
    assert (tmp_path / 'out/meta.json').exists()


def test_an_error_while_writing_leaves_the_old_folder(tmp_path, monkeypatch):
    """Whatever fails, and whenever: the old data set is whole, and nothing lies beside it."""
    write(tmp_path / 'out/meta.json', 'the old one')
    source = write(tmp_path / 'a.txt', 'abc' * 20)
    before = contents(tmp_path)
    for error in (OSError(28, 'No space left on device'), KeyboardInterrupt()):
        def fail(*args, error=error):
            raise error
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(prepare_data, 'write_json', fail)
            prepare(Settings(input=[source], tokenizer='byte', out_dir=str(tmp_path / 'out')))
        assert contents(tmp_path) == before and sorted(os.listdir(tmp_path)) == ['a.txt', 'out'], f'after {error!r}'


@pytest.mark.parametrize('fails', [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(tmp_path, monkeypatch, fails):
    """Between 'the old one steps aside' and 'the new one takes its name' nothing may be lost."""
    write(tmp_path / 'out/meta.json', 'the old one')
    source = write(tmp_path / 'a.txt', 'abc' * 20)
    calls, rename = [], os.rename

    def rename_or_fail(old, new):
        calls.append(new)
        if len(calls) == fails:
            raise PermissionError(13, 'in use', old)
        rename(old, new)

    monkeypatch.setattr(os, 'rename', rename_or_fail)
    with pytest.raises(OSError, match='in use'):
        prepare(Settings(input=[source], tokenizer='byte', out_dir=str(tmp_path / 'out')))
    assert contents(tmp_path / 'out') == {'meta.json': b'the old one'}, sorted(os.listdir(tmp_path))


def test_folders_beside_the_new_one_are_left_alone(tmp_path):
    """A user may have kept an older folder as NAME.old or NAME.tmp: preparing NAME again touches neither."""
    (tmp_path / 'a.txt').write_text('some text, long enough to be split. ' * 9, encoding='utf-8')
    for name in ('d', 'd.old', 'd.tmp'):
        (tmp_path / name).mkdir()
        if name != 'd':
            (tmp_path / name / 'mine').write_text('kept', encoding='utf-8')
    for _ in range(2):
        prepare_data.prepare(prepare_data.Settings(input=[str(tmp_path / 'a.txt')], tokenizer='byte',
                                                   out_dir=str(tmp_path / 'd')))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.txt', 'd', 'd.old', 'd.tmp']
    assert all((tmp_path / name / 'mine').read_text(encoding='utf-8') == 'kept' for name in ('d.old', 'd.tmp'))


def test_a_linked_folder_is_replaced_without_leftovers(tmp_path):
    """data/NAME may be a link to a larger disk."""
    write(tmp_path / 'disk/out/meta.json', '{}')
    (tmp_path / 'out').symlink_to(tmp_path / 'disk/out')
    prepare(Settings(input=[write(tmp_path / 'a.txt', 'abc' * 20)], tokenizer='byte', out_dir=str(tmp_path / 'out')))
    assert 'train.bin' in contents(tmp_path / 'out') and sorted(os.listdir(tmp_path)) == ['a.txt', 'disk', 'out']


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    """Four times the text, about the same peak."""
    monkeypatch.setattr(prepare_data, 'BLOCK', 1 << 14)
    draw = random.Random(0)
    lines = [' '.join(f'word{draw.randrange(50)}' for _ in range(12)) + '.\n' for _ in range(1000)]
    peaks = []
    for megabytes in (1, 4):
        path = write(tmp_path / 'a.txt', ''.join(lines) * (megabytes * 1_000_000 // sum(map(len, lines))))
        tracemalloc.start()
        try:
            prepare(Settings(input=[path], vocab_size=400, out_dir=str(tmp_path / 'out')))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 500_000, f'{peaks[0]:,} bytes for 1 MB, {peaks[1]:,} for 4 MB'


def test_parallel_keeps_the_order_and_does_not_read_far_ahead(monkeypatch):
    """The second result is ready before the first, and still comes second; few items wait."""
    monkeypatch.setattr(os, 'cpu_count', lambda: 4)
    second_done, taken = threading.Event(), []

    def items():
        for i in range(40):
            taken.append(i)
            yield i

    def work(i):
        if i == 0:
            assert second_done.wait(60), 'the second item must not wait for the first'
        if i == 1:
            second_done.set()
        return i * i

    for i, result in enumerate(prepare_data.parallel(work, items())):
        assert result == i * i
        assert len(taken) <= i + 6, f'{len(taken)} items taken for {i + 1} results on 4 cores'
    assert len(taken) == 40


def test_parallel_passes_an_error_on():
    """A worker's error is the caller's."""
    with pytest.raises(ValueError, match='never seen'):
        list(prepare_data.parallel(lambda text: encode(prepare_data.char_tokenizer('a'), text), ['a', 'b', 'a']))


def test_the_examples_in_docstrings_hold():
    """doctest, and there are some."""
    result = doctest.testmod(prepare_data)
    assert result.attempted and not result.failed, result

# -----------------------------------------------------------------------------
# Errors: (files, flags, what the line must say). `{}` in a flag is the folder of the files.

BAD = '{"text": "ok"}\n\n'
ERRORS = {
    'a missing file': ({}, ['--input', 'none.txt'], 'no file or folder none.txt'),
    'a missing validation file': ({'a.txt': 'abc' * 9}, ['--input', 'a.txt', '--val', 'none.txt'], 'none.txt'),
    'an empty file': ({'a.txt': ''}, ['--input', 'a.txt'], 'a.txt: no text in it'),
    'markers alone': ({'a.txt': '<|endoftext|>\n' * 3}, ['--input', 'a.txt'], 'a.txt: no text in it'),
    'a folder without files': ({'f/.hidden': 'x'}, ['--input', 'f'], 'folder f holds no files'),
    'an empty validation file': ({'a.txt': 'abc', 'v.txt': ''},
                                 ['--input', 'a.txt', '--val', 'v.txt', '--tokenizer', 'byte'], 'too short for a val split'),
    'one character': ({'a.txt': '世'}, ['--input', 'a.txt'], 'a text of 1 characters is too short to split'),
    'two characters': ({'a.txt': 'ab'}, ['--input', 'a.txt', '--tokenizer', 'byte'], 'too short for a train split'),
    'not UTF-8': ({'a.txt': '世界'.encode() + b'\xff...'}, ['--input', 'a.txt'], 'a.txt is not UTF-8: the byte at offset 6'),
    'not UTF-8, far behind': ({'a.txt': b'abc ' * 600_000 + b'\xe9t\xe9'}, ['--input', 'a.txt'], 'at offset 2400000 '),
    'UTF-16': ({'a.txt': '\ufeffabc'.encode('utf-16-le')}, ['--input', 'a.txt'], 'the byte at offset 0'),
    'cut short': ({'a.txt': 'abc世'.encode()[:-1]}, ['--input', 'a.txt'], 'the byte at offset 3'),
    'rows that are not UTF-8': ({'a.jsonl': BAD.encode() + b'"\xff'}, ['--input', 'a.jsonl'], 'the byte at offset 17'),
    'rows that are not JSON': ({'a.jsonl': BAD + '{"text": "ok"'}, ['--input', 'a.jsonl'], 'a.jsonl, line 3: '),
    'rows without text': ({'a.jsonl': BAD + '{"body": "x"}'}, ['--input', 'a.jsonl'], 'a.jsonl, line 3: '),
    'rows whose text is a number': ({'a.jsonl': BAD + '{"text": 5}'}, ['--input', 'a.jsonl'], 'a.jsonl, line 3: '),
    'rows that are lists': ({'a.jsonl': BAD + '["x"]'}, ['--input', 'a.jsonl'], 'a.jsonl, line 3: '),
    'rows that are strings': ({'a.jsonl': BAD + '"x"'}, ['--input', 'a.jsonl'], 'a.jsonl, line 3: '),
    'rows with half a character': ({'a.jsonl': BAD + '{"text": "\\ud83d"}'}, ['--input', 'a.jsonl'], 'a.jsonl, line 3: '),
    'rows without bottom': ({'a.jsonl': BAD + '{"text": ' + '[' * 100_000}, ['--input', 'a.jsonl'], 'a.jsonl, line 3: '),
    'an unknown tokenizer': ({'a.txt': 'abc' * 9}, ['--input', 'a.txt', '--tokenizer', 'sentencepiece'],
                             '--tokenizer sentencepiece: choose char, byte, bpe, gpt2'),
    'a folder without tokenizer': ({'f/a.txt': 'abc' * 9}, ['--input', 'f', '--tokenizer', 'f'], 'holds no tokenizer.json'),
    'a broken tokenizer': ({'f/tokenizer.json': '{"format', 'a.txt': 'abc' * 9}, ['--input', 'a.txt', '--tokenizer', 'f'],
                           'tokenizer.json is damaged'),
    'a vocabulary too small': ({'a.txt': 'abc' * 9}, ['--input', 'a.txt', '--vocab_size', '300'], '--vocab_size 300: '),
    'a fraction out of range': ({'a.txt': 'abc' * 9}, ['--input', 'a.txt', '--val_fraction', '1'],
                                '--val_fraction 1.0: must be above 0 and below 1'),
    'no source': ({}, [], 'give either --input PATH... or --dataset NAME'),
    'two sources': ({'a.txt': 'abc' * 9}, ['--input', 'a.txt', '--dataset', 'pydoc'], 'give either --input'),
    'an unknown data set': ({}, ['--dataset', 'pidoc'], '--dataset pidoc: choose one of'),
    'a mirror without the file': ({}, ['--dataset', 'shakespeare', '--mirror', 'nowhere'], '--mirror URL or FOLDER'),
    'an unknown flag': ({}, ['--imput', 'a.txt'], 'unknown flag --imput: did you mean --input?'),
    'an unknown task': ({'a.txt': 'abc' * 9}, ['--input', 'a.txt', '--task', 'translate'],
                        '--task translate: choose one of'),
    'a data set for another task': ({}, ['--dataset', 'pydoc', '--task', 'tag'], '--task tag: pydoc is for lm'),
    'examples too short': ({'a.tsv': 'x\ta\n' * 9}, ['--input', 'a.tsv', '--task', 'classify', '--block_size', '7'],
                           '--block_size 7: must be at least 8'),
}


@pytest.mark.parametrize('name', ERRORS)
def test_an_error_is_one_sentence_and_leaves_everything_as_it_was(tmp_path, monkeypatch, name):
    """The message names what is wrong in one line; an old data folder stays, and nothing new appears."""
    files, flags, says = ERRORS[name]
    for path, text in files.items():
        write(tmp_path / path, text)
    write(tmp_path / 'out/meta.json', 'the old one')
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path), sorted(os.listdir())
    with pytest.raises((ValueError, OSError)) as error:
        prepare(Settings(**read_flags([*flags, '--out_dir', 'out'], '', {'flags': Settings})))
    assert says in str(error.value) and '\n' not in str(error.value), error.value
    assert (contents(tmp_path), sorted(os.listdir())) == before


@pytest.mark.parametrize('name', ['a missing file', 'not UTF-8', 'rows that are not JSON', 'a fraction out of range',
                                  'no source', 'an unknown flag'])
def test_an_error_on_the_command_line_is_one_line_and_status_2(tmp_path, name):
    """No traceback, nothing on standard output, nothing left behind."""
    files, flags, says = ERRORS[name]
    for path, text in files.items():
        write(tmp_path / path, text)
    before = contents(tmp_path), sorted(os.listdir(tmp_path))
    result = command('prepare_data.py', *flags, '--out_dir', 'out', cwd=tmp_path, status=2)
    assert result.stdout == '' and result.stderr.count('\n') == 1, result.stderr
    assert result.stderr.startswith('prepare_data.py: error: ') and says in result.stderr, result.stderr
    assert (contents(tmp_path), sorted(os.listdir(tmp_path))) == before


def test_a_good_run_says_what_it_made_and_what_comes_next(tmp_path):
    """Two lines of counts, the next command, and silence on standard error, also with a name in Chinese."""
    line = '床前明月光，疑是地上霜。\n'
    write(tmp_path / '诗.txt', line * 30)
    result = command('prepare_data.py', '--input', '诗.txt', '--tokenizer=char', '--val-fraction', 0.2, cwd=tmp_path,
                     env=os.environ | {'PYTHONIOENCODING': 'ascii'})
    assert result.stderr == ''
    train, val, last = result.stdout.splitlines()
    assert train == 'train: 312 tokens, 312 characters, 24 sentences, 1 document', train
    assert val == 'val:   79 tokens, 78 characters, 6 sentences, 1 document', val
    assert last == (f"{os.path.join('data', '诗')}: char tokenizer, vocabulary of {len(set(line)) + 105}. "
                    'Next: python train.py --dataset 诗'), last


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path):
    """`| head` closes the pipe: no traceback, status 0, also where Python buffers what it prints."""
    write(tmp_path / 'a.txt', 'some words ' * 30)
    reading, writing = os.pipe()
    os.close(reading)
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'}
    with os.fdopen(writing, 'w') as closed:
        result = subprocess.run([sys.executable, str(ROOT / 'prepare_data.py'), '--input', 'a.txt', '--tokenizer', 'byte'],
                                cwd=tmp_path, env=env, stdout=closed, stderr=subprocess.PIPE, encoding='utf-8', timeout=300)
    assert (result.returncode, result.stderr) == (0, '')


@pytest.mark.parametrize('error, status, says', [
    (ValueError('n is 3'), 2, 'prepare.py: error: n is 3\n'),
    (FileNotFoundError('no such thing'), 2, 'prepare.py: error: no such thing\n'),
    (FileNotFoundError(2, 'No such file', 'a.txt'), 2, 'prepare.py: error: a.txt: No such file\n'),
    (OSError(28, 'full'), 2, 'prepare.py: error: full\n'),
    (KeyboardInterrupt(), 130, ''),
], ids=str)
def test_run_turns_errors_into_a_line_and_a_status(monkeypatch, capsys, error, status, says):
    """What the user can mend is a line, Ctrl-C is silent; anything else is a bug and keeps its traceback."""
    def main(argv):
        assert argv == ['--x', '1']
        raise error
    monkeypatch.setattr(sys, 'argv', ['/somewhere/prepare.py', '--x', '1'])
    with pytest.raises(SystemExit) as end:
        prepare_data.run(main)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err) == (status, '', says)


def test_run_keeps_the_traceback_of_a_bug(monkeypatch):
    """A KeyError is nobody's slip but ours."""
    monkeypatch.setattr(sys, 'argv', ['prepare.py'])
    with pytest.raises(KeyError):
        prepare_data.run(lambda argv: {}['x'])

# -----------------------------------------------------------------------------
# Fine-tuning: where tokens stand in a text, and the examples of a row

MIXED = st.text(st.sampled_from("ab .'1é世界明月😀\u0301\u200d\u3000\n") | st.characters(codec='utf-8'), max_size=60)
WORD = st.text(st.sampled_from("ab.'1é世界明月😀\u0301") | st.characters(codec='utf-8'), min_size=1, max_size=9).filter(
    lambda word: not any(c.isspace() for c in word))


def make(name, text, bpe):
    """A tokenizer that can write `text`."""
    return {'char': lambda: prepare_data.char_tokenizer(set(text)), 'byte': prepare_data.byte_tokenizer, 'bpe': lambda: bpe}[
        name]()


@settings(max_examples=60)
@given(MIXED)
@example('世界😀 cafe\u0301\r\n <|endoftext|>👩\u200d👩\u200d👧')
def test_offsets_slice_the_original_text_for_any_unicode(request, bpe, text):
    """A token's slice is every character it has a part of; slices leave no gap, and go back only over a shared character."""
    gpt2 = request.getfixturevalue('gpt2')
    owner = [i for i, c in enumerate(text) for _ in c.encode()]        # of every byte, the character
    for tokenizer in (*(make(name, text + 'x', bpe) for name in ('char', 'byte', 'bpe')), gpt2):
        ids, spans = prepare_data.encode_spans(tokenizer, text)
        assert ids.tolist() == encode(tokenizer, text).tolist() and spans.shape == (len(ids), 2), tokenizer.name
        at, joined = 0, ''
        for i, (start, end) in zip(ids.tolist(), spans.tolist()):
            part = tokenizer.decode_single_token_bytes(i)
            about = f'{tokenizer.name}: {part} of {text!r} at ({start}, {end})'
            assert (start, end) == (owner[at], owner[at + len(part) - 1] + 1), about
            assert part in text[start:end].encode(), about
            assert start <= len(joined) <= start + 1, f'{about}, after {joined!r}'
            joined += text[len(joined):end]
            at += len(part)
        assert joined == text, f'{tokenizer.name}: {joined!r} instead of {text!r}'


def test_a_character_of_several_tokens_belongs_to_each():
    """The bytes of 世 all stand where it stands; an empty text has no tokens, and still two columns."""
    byte = prepare_data.byte_tokenizer()
    assert prepare_data.encode_spans(byte, 'a世b')[1].tolist() == [[0, 1], [1, 2], [1, 2], [1, 2], [2, 3]]
    assert prepare_data.encode_spans(byte, '')[1].shape == (0, 2)


def test_texts_are_framed_as_bert_reads_them():
    """[CLS] a [SEP], [CLS] a [SEP] b [SEP]; each [SEP] belongs to the text before it."""
    byte = prepare_data.byte_tokenizer()
    cls, sep = byte._special_tokens['[CLS]'], byte._special_tokens['[SEP]']
    assert prepare_data.frame(byte, [1, 2]) == ([cls, 1, 2, sep], [0, 0, 0, 0])
    assert prepare_data.frame(byte, [1, 2], [3]) == ([cls, 1, 2, sep, 3, sep], [0, 0, 0, 0, 1, 1])
    assert prepare_data.frame(byte, [], [3]) == ([cls, sep, 3, sep], [0, 0, 1, 1])
    assert prepare_data.frame(byte, []) == ([cls, sep], [0, 0])


@settings(max_examples=80)
@given(st.lists(MIXED, min_size=1, max_size=2), st.integers(8, 60))
@example(['a' * 50, '世界'], 20)
@example(['世界', '😀' * 50], 20)
@example(['[SEP]' * 9, '[CLS]' * 9], 8)                      # special tokens written in a text are text
def test_a_text_too_long_loses_the_end_of_the_longer(bpe, texts, block_size):
    """Never more than block_size tokens, and no fewer than fit; the last is [SEP], each text is kept from its beginning."""
    # b8: cutting after joining lost the final [SEP]
    row = dict(zip(('text', 'text_b'), texts)) | {'label': '好', 'where': 'reviews.tsv, line 3'}
    for tokenizer in (prepare_data.byte_tokenizer(), bpe):
        [made] = classify_examples(tokenizer, row, ['坏', '好'], block_size)
        ids, whole = made['ids'], [encode(tokenizer, text).tolist() for text in texts]
        seps = [i for i, token in enumerate(ids) if token == tokenizer._special_tokens['[SEP]']]
        assert len(ids) == min(block_size, sum(map(len, whole)) + 1 + len(texts)), f'{len(ids)} tokens of {block_size}'
        assert len(seps) == len(texts) and seps[-1] == len(ids) - 1, f'[SEP] at {seps} of {len(ids)}'
        assert ids[0] == tokenizer._special_tokens['[CLS]']
        kept = [ids[a + 1:b] for a, b in zip([0, *seps], seps)]
        longest = max(map(len, kept))
        for part, text in zip(kept, whole):
            assert part == text[:len(part)]
            assert len(part) == len(text) or len(part) >= longest - 1, f'{len(part)} of {len(text)}, beside {longest}'
        assert made['segments'] == [0] * (seps[0] + 1) + [1] * (len(ids) - seps[0] - 1)
        assert made['targets'] == 1 and made['about'].items() >= {k: v for k, v in row.items() if k != 'where'}.items()


def test_rows_to_be_answered_have_no_targets():
    """What a user asks has no label, no tags and no answers: the examples are the same, without targets."""
    rows = {'classify': ({'text': '床前明月光'}, {'label': 'b'}), 'tag': ({'tokens': ['明', '月']}, {'tags': ['O', 'O']}),
            'qa': ({'question': '谁？', 'context': '床前明月光 ' * 9}, {'id': 'q', 'answers': [(2, '明月')]})}
    for task, (asked, gold) in rows.items():
        plain = TASKS[task].examples(prepare_data.byte_tokenizer(), asked, ['O', 'b'], 40)
        right = TASKS[task].examples(prepare_data.byte_tokenizer(), asked | gold, ['O', 'b'], 40)
        assert all('targets' not in made for made in plain) and all('targets' in made for made in right), task
        assert [made['ids'] for made in plain] == [made['ids'] for made in right], task


@settings(max_examples=60)
@given(st.lists(st.tuples(WORD, st.sampled_from(['O', 'B-地', 'I-地'])), min_size=1, max_size=12), st.integers(8, 40))
@example([('😀' * 9, 'B-地'), ('a', 'I-地'), ('世界' * 9, 'O')], 8)
@example([('ab', 'O'), ('cd', 'B-地'), ('e', 'I-地')], 8)
def test_the_first_piece_carries_the_tag_and_no_token_is_lost(bpe, row, block_size):
    """Parts of a long text hold all tokens once, in order; the other pieces of a token, [CLS] and [SEP] are not asked."""
    tokens, tags = map(list, zip(*row))
    labels = ['O', 'B-地', 'I-地']
    for name in ('char', 'byte', 'bpe'):
        tokenizer = make(name, ' '.join(tokens) + ' ', bpe)
        made = tag_examples(tokenizer, {'tokens': tokens, 'tags': tags}, labels, block_size)
        assert [token for part in made for token in part['about']['tokens']] == tokens, name
        assert [tag for part in made for tag in part['about']['tags']] == tags, name
        for part in made:
            ids, about, targets = part['ids'], part['about'], part['targets']
            n, here = len(ids), about['tokens']
            assert n <= block_size and len(targets) == n
            assert (ids[0], ids[-1]) == (tokenizer._special_tokens['[CLS]'], tokenizer._special_tokens['[SEP]'])
            asked = {i: target for i, target in enumerate(targets) if target != prepare_data.IGNORE}
            expected = dict(zip(about['where'], map(labels.index, about['tags'])))
            assert asked == expected and len(expected) == len(here), f'{name}: asked {asked}, not {expected}'
            pieces = tokenizer.decode_tokens_bytes(ids[1:-1])
            data, text = b''.join(pieces), ' '.join(here).encode()
            one_too_long = len(here) == 1 and n == block_size and text.startswith(data.lstrip(b' '))
            assert data.strip(b' ') == text or one_too_long, f'{name}: {data} instead of {text}'
            lead, ends = len(data) - len(data.lstrip(b' ')), [0, *itertools.accumulate(map(len, pieces))]
            for i, where in enumerate(about['where']):
                begins = lead + len(' '.join([*here[:i], '']).encode())  # the token's first byte
                assert ends[where - 1] <= begins < ends[where], f'{name}: {here[i]!r} of {here} asked at {pieces[where - 1]}'


def test_a_tagged_text_is_cut_between_tokens_where_it_no_longer_fits():
    """A worked example of 6 tokens beside [CLS] and [SEP]: `Jo` and `世` fill the first part, `ab` makes the second."""
    byte = prepare_data.byte_tokenizer()
    cls, sep = byte._special_tokens['[CLS]'], byte._special_tokens['[SEP]']
    one, two = tag_examples(byte, {'tokens': ['Jo', '世', 'ab'], 'tags': ['B-人', 'O', 'I-人']}, ['O', 'B-人', 'I-人'], 9)
    dot = prepare_data.IGNORE
    assert one['ids'] == [cls, *'Jo 世 '.encode(), sep] and one['targets'] == [dot, 1, dot, dot, 0, dot, dot, dot, dot]
    assert two['ids'] == [cls, *b'ab', sep] and two['targets'] == [dot, 2, dot, dot], two
    assert one['about'].items() >= {'tokens': ['Jo', '世'], 'tags': ['B-人', 'O'], 'where': [1, 4]}.items(), one['about']


def pointed_at(made):
    """Where in the whole context the targets of a qa example begin and end; None where they point at [CLS]."""
    about, (low, high) = made['about'], made['targets']
    if (low, high) == (0, 0):
        return None
    (begin, _), (_, end) = about['offsets'][low - about['first']], about['offsets'][high - about['first']]
    return about['start'] + begin, about['start'] + end


@settings(max_examples=120)
@given(st.sampled_from(['char', 'byte', 'bpe']), MIXED.filter(str.strip), st.integers(0, 59), st.integers(1, 12),
       st.integers(8, 40))
@example('bpe', '床前明月光，疑是地上霜。' * 9, 2, 2, 24)              # inside of a token
@example('bpe', 'It was the best of times, it was the worst. ' * 9, 3, 1, 16)
@example('bpe', 'It was the best of times', 7, 4, 40)              # with white space before it
@example('byte', '床前明月光，疑是地上霜。' * 9, 20, 3, 24)
@example('char', '床前明月光，疑是地上霜。' * 9, 50, 12, 24)
def test_windows_cover_every_answer_and_every_character(bpe, name, context, start, size, block_size):
    """Every answer that fits stands whole in a window, whose targets give it back; together the windows hold the context."""
    start %= len(context)
    answer = context[start:start + size]
    if not answer.strip():
        return
    question = '谁 is it?'
    tokenizer = make(name, context + question, bpe)
    special, asked = tokenizer._special_tokens, encode(tokenizer, question).tolist()[:block_size // 2]
    room = block_size - 3 - len(asked)
    try:
        windows = qa_examples(tokenizer, {'id': 'q1', 'question': question, 'context': context,
                                          'answers': [(start, answer)]}, [], block_size)
    except ValueError as e:
        assert 'larger --block_size' in str(e) and len(answer.encode()) > room, f'{e}: it has at most {len(answer.encode())}'
        return
    found, covered = 0, set()
    for made in windows:
        ids, about = made['ids'], made['about']
        first, n, low = about['first'], len(about['offsets']), about['start']
        assert ids[:first] == [special['[CLS]'], *asked, special['[SEP]']] and ids[first + n:] == [special['[SEP]']]
        assert len(ids) <= block_size and made['segments'] == [0] * first + [1] * (n + 1)
        assert about['context'] == context[low:low + len(about['context'])] and about['answers'] == [answer]
        covered |= {*range(low, low + len(about['context']))}
        for i, (a, b) in zip(ids[first:], about['offsets']):
            part = tokenizer.decode_single_token_bytes(i)
            assert 0 <= a < b and part in about['context'][a:b].encode(), f'{name}: {part} at {a, b} of {about["context"]!r}'
        if place := pointed_at(made):
            found += 1
            recovered, space = context[slice(*place)], len(answer) - len(answer.lstrip())
            assert recovered.strip() == answer.strip(), f'{name}: {recovered!r} instead of {answer!r}'
            assert place[1] - len(recovered.lstrip()) == start + space, f'{name}: the {answer!r} at {place}, not {start}'
    assert found, f'{name}: no window of {room} tokens holds {answer!r} at {start} of {context!r}'
    assert covered == {*range(len(context))}, (
        f'{name}: characters {sorted({*range(len(context))} - covered)} of {len(context)} are in no window of {room} tokens')


@settings(max_examples=60)
@given(st.integers(0, 80), st.integers(8, 30), st.integers(0, 79), st.integers(1, 12))
def test_windows_overlap_by_half_and_only_those_that_hold_the_answer_point_at_it(n, block_size, start, size):
    """With a token a character: steps of half a window up to the end; what a window holds in part it does not hold."""
    context = ''.join(chr(0x4E00 + i) for i in range(n))
    char = prepare_data.char_tokenizer(context + '问')
    room = block_size - 4
    row = {'id': 'q', 'question': '问', 'context': context, 'answers': []}
    windows = qa_examples(char, row, [], block_size)
    starts = [made['about']['start'] for made in windows]
    assert starts == [0] if n <= room else (starts[0], starts[-1]) == (0, n - room), (starts, n, room)
    assert all(0 < b - a <= max(1, room // 2) for a, b in zip(starts, starts[1:])), f'{starts} with room for {room}'
    assert len(starts) <= 1 + max(0, -((room - n) // max(1, room // 2))), f'more windows than needed: {starts}'
    assert all(made['targets'] == [0, 0] and made['ids'][0] == char._special_tokens['[CLS]'] for made in windows)
    start, size = min(start, n - 1), min(size, n - start)
    if n and 0 < size <= room:
        row['answers'] = [(start, context[start:start + size])]
        windows = qa_examples(char, row, [], block_size)
        own = {start} if not any(at <= start and start + size <= at + room for at in starts) else set()
        assert [made['about']['start'] for made in windows] == sorted({*starts} | own), 'one of its own, where none holds it'
        for made in windows:
            at = made['about']['start']
            inside = at <= start and start + size <= at + room
            assert pointed_at(made) == ((start, start + size) if inside else None), f'window {at} of {room}: {start}, {size}'


def test_an_answer_inside_of_a_token_is_cut_out_of_it():
    """moon in a word that is one token: the word is cut around the answer, so that targets can point at just that."""
    bpe = prepare_data.bpe_tokenizer(['amoonlit\n' * 9], 375)
    assert len(encode(bpe, 'amoonlit')) == 1
    context = 'amoonlit'
    [made] = qa_examples(bpe, {'id': 'q', 'question': '?', 'context': context, 'answers': [(1, 'moon')]}, [], 32)
    assert pointed_at(made) == (1, 5) and made['about']['context'] == context, made
    assert b''.join(bpe.decode_tokens_bytes(made['ids'][3:-1])).decode() == context
    [made] = qa_examples(bpe, {'id': 'q', 'question': '?', 'context': context, 'answers': [(0, context)]}, [], 32)
    assert len(made['ids']) == 5 and pointed_at(made) == (0, 8), 'a token that is the answer stays whole'
    chinese = prepare_data.bpe_tokenizer(['床前明月光\n' * 9], 375)
    assert len(encode(chinese, '床前明月光')) == 1
    spans = prepare_data.encode_spans(chinese, '床前明月光')[1]
    assert {tuple(span) for span in spans.tolist()} == {(i, i + 1) for i in range(5)}, 'a CJK character is a word'


def test_of_several_answers_the_first_is_learned_and_all_are_kept():
    """Where people disagree, any of them scores; which one is learned must not depend on chance."""
    row = {'id': 'q', 'question': '几?', 'context': '两个，还是two?', 'answers': [(5, 'two'), (0, '两'), (0, '两个')]}
    [made] = qa_examples(prepare_data.byte_tokenizer(), row, [], 64)
    assert pointed_at(made) == (5, 8) and made['about']['answers'] == ['two', '两', '两个']


def test_a_question_is_cut_to_half_and_an_empty_context_is_a_window():
    """However long the question, half of block_size is left to read in; where nothing is to read, no answer is right."""
    byte = prepare_data.byte_tokenizer()
    row = {'id': 'q', 'question': '谁' * 99, 'context': 'x' * 30, 'answers': [(29, 'x')]}
    windows = qa_examples(byte, row, [], 20)
    assert {made['about']['first'] for made in windows} == {12} and any(map(pointed_at, windows))
    [made] = qa_examples(byte, {'id': 'q', 'question': '谁', 'context': '', 'answers': []}, [], 20)
    assert made['targets'] == [0, 0] and made['about']['offsets'] == [] and made['about']['context'] == '', made


@pytest.mark.parametrize('tokenizer, block_size', [('bpe', 128), ('char', 400)])
def test_every_gold_answer_of_xquad_comes_back_from_its_prepared_example(tmp_path, shared, tokenizer, block_size):
    """Out of the files alone: 1,190 questions, each answered in at least one window, exactly and in its place."""
    path = shared / 'data/xquad.en.json'
    _, meta = prepare(Settings(input=[str(path)], task='qa', tokenizer=tokenizer, vocab_size=1000, block_size=block_size,
                               out_dir=str(tmp_path / 'out')))
    gold = {q['id']: (p['context'], q['answers'][0]['answer_start'], q['answers'][0]['text'])
            for article in json.loads(path.read_bytes())['data'] for p in article['paragraphs'] for q in p['qas']}
    found, contexts = collections.Counter(), {}
    for split in ('train', 'val'):
        lines = (tmp_path / f'out/{split}.jsonl').read_bytes().splitlines()
        assert len(lines) == meta['counts'][split]['examples'] > meta['counts'][split]['rows'], meta['counts']
        for made in map(json.loads, lines):
            context, start, answer = gold[made['about']['id']]
            contexts.setdefault(split, set()).add(context)
            if place := pointed_at(made):
                found[made['about']['id']] += 1
                low = made['about']['start']
                text = made['about']['context'][place[0] - low:place[1] - low]
                assert text.strip() == answer.strip() == context[slice(*place)].strip(), f'{text!r} instead of {answer!r}'
                assert abs(place[0] - start) <= 1, f'{answer!r} at {place}, not at {start}'
    assert len(gold) == len(found) == 1190, f'{len(found)} of {len(gold)} answers found'
    assert not contexts['train'] & contexts['val'], 'a context in both splits'

# -----------------------------------------------------------------------------
# Fine-tuning: rows as people have them


def rows_of(task, path):
    """What the reader of a task finds, without the places."""
    return [{key: value for key, value in row.items() if key != 'where'} for row in TASKS[task].read(path)]


FIELD = st.text(st.characters(codec='utf-8', exclude_characters='\t\n\r'), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=60)
@given(st.lists(st.lists(FIELD, min_size=2, max_size=3), max_size=6), st.sampled_from(['\n', '\r\n', '\n\n', '\n \n']),
       st.booleans(), st.booleans())
@example([['好', '床前\x85明月光\u2028 "quotes" \x1c']], '\r\n', True, False)  # neither \x85 nor \u2028 ends a line
def test_labelled_lines_come_back_whatever_is_in_them(tmp_path, fields, end, marked, last):
    """label<TAB>text[<TAB>second text]; line ends of both kinds, blank lines, a byte order mark, no line end at the end."""
    text = end.join(['x' + '\t'.join(row) for row in fields] + [''] * (last and bool(fields)))
    path = write(tmp_path / 'a.tsv', '\ufeff' * marked + text)
    expected = [dict(zip(('label', 'text', 'text_b'), [' '.join(('x' + row[0]).split()), *row[1:]]))
                for row in fields]  # nobody means two labels that differ by a space at the end
    assert rows_of('classify', path) == expected
    assert rows_of('classify', write(tmp_path / 'a.jsonl', '\ufeff' * marked + end.join(
        json.dumps(row | {'id': 5}, ensure_ascii=last) for row in expected))) == expected, 'the same rows as JSONL'


@settings(max_examples=60)
@given(st.lists(st.lists(st.tuples(WORD, st.sampled_from(['O', 'B-人', 'I-人', 'B-a-b'])), min_size=1, max_size=5),
                max_size=4), st.sampled_from(['\n', '\r\n']), st.booleans(),
       st.sampled_from(['\t', ' ', ' NN x ', '\tNN\tx\t', ' \t ']))
def test_tagged_lines_come_back_whatever_is_in_them(tmp_path, texts, end, marked, between):
    """First column the token, last its tag, parted by tabs or spaces; blank lines, or one with a lone tab, between texts."""
    text = (2 * end).join(end.join(f'x{word}{between}{tag}' for word, tag in row) + end for row in texts)
    path = write(tmp_path / 'a.conll', '\ufeff' * marked + text.replace(2 * end, f'{end}\t{end}'))
    tokens = [{'tokens': ['x' + word + ' ' * (between == ' \t ') for word, _ in row], 'tags': [tag for _, tag in row]}
              for row in texts]
    assert rows_of('tag', path) == tokens


def test_the_tagged_files_of_2003_are_read():
    """Four columns, -DOCSTART- lines, several blank lines: as CoNLL 2003 has it."""
    path = '-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\n-DOCSTART- -X- O O\n北京 NNP B-NP B-LOC'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, 'read_lines', lambda _: enumerate(path.split('\n'), 1))
        assert list(prepare_data.read_tagged('a.conll')) == [
            {'where': 'a.conll, line 3', 'tokens': ['EU', 'rejects'], 'tags': ['B-ORG', 'O']},
            {'where': 'a.conll, line 8', 'tokens': ['北京'], 'tags': ['B-LOC']}]


def squad(*paragraphs, indent=1, ascii=False):
    """(context, [(id, question, [(answer_start, text), ...]), ...]) -> SQuAD's JSON."""
    return json.dumps({'version': '1.1', 'data': [{'title': '诗', 'paragraphs': [{
        'context': context, 'qas': [{'id': i, 'question': question, 'answers': [
            {'answer_start': start, 'text': text} for start, text in answers]} for i, question, answers in asked]}]}
        for context, asked in paragraphs]}, indent=indent, ensure_ascii=ascii)


@pytest.mark.parametrize('ascii', [False, True])
@pytest.mark.parametrize('indent', [None, 1])
def test_questions_are_read_from_squad_1_and_2(tmp_path, indent, ascii):
    """Offsets count characters, also behind an emoji; questions without an answer are rows like any other."""
    text = squad(('😀床前明月光', [('q1', '什么？', [(3, '明月'), (1, '床')]), ('q2', 'Who?', [])]),
                 ('x', [('q3', '谁', [(0, 'x')])]), indent=indent, ascii=ascii)
    two = json.loads(text)
    two['data'][0]['paragraphs'][0]['qas'][1] |= {'is_impossible': True,
                                                  'plausible_answers': [{'text': '床', 'answer_start': 1}]}
    for saved in (text, '\ufeff' + text.replace('\n', '\r\n'), json.dumps(two, ensure_ascii=ascii, indent=indent)):
        path = write(tmp_path / 'a.json', saved)
        assert rows_of('qa', path) == [
            {'id': 'q1', 'question': '什么？', 'context': '😀床前明月光', 'answers': [(3, '明月'), (1, '床')]},
            {'id': 'q2', 'question': 'Who?', 'context': '😀床前明月光', 'answers': []},
            {'id': 'q3', 'question': '谁', 'context': 'x', 'answers': [(0, 'x')]}]
        for row, name in zip(prepare_data.read_questions(path), ('q1', 'q2', 'q3')):
            line = 1 + saved[:saved.index(f'"{name}"')].count('\n')
            assert row['where'] == f'{path}, line {line} (question {name})', row['where']


@pytest.mark.parametrize('name', [2, '明月', '二'])
def test_the_line_of_a_question_is_that_of_its_id(tmp_path, name):
    """Also where the id is a number, stands elsewhere as an answer, or is written in escapes."""
    text = squad(('床前明月光2', [('q1', '什么？', [(2, '明月')]), (name, '2?', [(0, '月')])]), ascii=name == '二')
    with pytest.raises(ValueError, match='does not stand at its answer_start 0') as error:
        [*prepare_data.read_questions(write(tmp_path / 'a.json', text))]
    line = [n for n, line in enumerate(text.split('\n'), 1) if '"id"' in line][1]
    assert f'a.json, line {line} ' in str(error.value), f'line {line} has the id: {error.value}'


def test_lines_are_counted_from_1_over_blank_ones(tmp_path):
    """`where` is what an editor shows."""
    path = write(tmp_path / 'a.tsv', '\ufeff\r\n好\t一\r\n\r\n \r\n坏\t二')
    assert [row['where'] for row in TASKS['classify'].read(path)] == [f'{path}, line 2', f'{path}, line 5']
    path = write(tmp_path / 'a.conll', '\n\na\tO\nb\tO\n\n\nc\tO\n')
    assert [row['where'] for row in TASKS['tag'].read(path)] == [f'{path}, line 3', f'{path}, line 7']

# -----------------------------------------------------------------------------
# Fine-tuning: the folder


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.sampled_from([0.05, 0.1, 0.25, 0.3, 0.5, 0.9]),
       st.booleans())
def test_rows_are_split_after_a_shuffle_that_keeps_contexts_together(contexts, val_fraction, questions):
    """Nothing is lost or doubled, the shuffle is the same every time, and no context is in both splits."""
    rows = [{'n': i} | ({'context': f'c{context}'} if questions else {}) for i, context in enumerate(contexts)]
    train, val = prepare_data.split_rows(rows, val_fraction)
    assert sorted(row['n'] for row in train + val) == [*range(len(rows))]
    assert (train, val) == prepare_data.split_rows(rows, val_fraction), 'another split the second time'
    wanted = len(rows) * (1 - val_fraction)
    largest = max(collections.Counter(contexts).values()) if questions else 1
    assert wanted - largest < len(train) <= wanted, f'{len(train)} rows of {len(rows)} to train, wanted {wanted}'
    if questions:
        assert not {row['context'] for row in train} & {row['context'] for row in val}


def test_rows_are_shuffled_before_they_are_split():
    """Files are often sorted by label: both splits must have all parts of the file."""
    train, val = prepare_data.split_rows([{'n': i} for i in range(1000)], 0.1)
    numbers = [row['n'] for row in train]
    assert len(val) == 100 and numbers != sorted(numbers)
    assert 20 < sum(row['n'] < 500 for row in val) < 80, [row['n'] for row in val]


FILES = {  # of each task: a file of ten rows, its labels in order
    'classify': ('a.tsv', ''.join(f'{label}\t句子 {i}\tpair 😀 {i}\n' for i, label in enumerate('好坏中好坏中好坏中好')),
                 ['中', '坏', '好']),
    'tag': ('a.conll', '\n'.join(f'第{i}\tB-序\n次\tI-人\nx\tO\n' for i in range(9)) + '\nz\tB-a\n',
            ['O', 'B-a', 'I-a', 'B-人', 'I-人', 'B-序', 'I-序']),
    'qa': ('a.json', squad(*(
        (f'第{i}句：床前明月光。', [(f'q{i}', '哪句？', [(1, str(i))] if i else [])]) for i in range(10))), ['no answer']),
}


@pytest.mark.parametrize('task', FILES)
def test_a_prepared_folder_holds_examples_that_a_model_reads(tmp_path, task):
    """A line of plain JSON each; its keys, but for about, are arguments of forward(), and the loss of each is a number."""
    name, text, labels = FILES[task]
    path = write(tmp_path / name, text)
    _, meta = prepare(Settings(input=[path], task=task, tokenizer='byte', val_fraction=0.3, block_size=48,
                               out_dir=str(tmp_path / 'out')))
    assert sorted(contents(tmp_path / 'out')) == ['meta.json', 'tokenizer.json', 'train.jsonl', 'val.jsonl']
    assert meta == json.loads((tmp_path / 'out/meta.json').read_text('utf-8'))
    assert {key: meta[key] for key in ('task', 'tokenizer', 'vocab_size', 'labels', 'block_size', 'source', 'sha256')} == {
        'task': task, 'tokenizer': 'byte', 'vocab_size': 361, 'labels': labels, 'block_size': 48, 'source': [path],
        'sha256': hashlib.sha256(text.encode()).hexdigest()}
    net = model.build(dataclasses.replace(model.PRESETS['bert'], n_layer=1, n_head=2, n_embd=8, vocab_size=361,
                                          block_size=48, task=task, n_labels=len(labels)))
    arguments = {*inspect.signature(net.forward).parameters}
    for split, rows in (('train', 7), ('val', 3)):
        lines = (tmp_path / f'out/{split}.jsonl').read_text('utf-8').split('\n')
        examples = [json.loads(line) for line in lines if line]
        assert lines[-1] == '' and len(examples) == len(lines) - 1, 'a line each, and a line end at the end'
        assert '床' in lines[0] or '句子' in lines[0] or '次' in lines[0], f'no escapes: {lines[0]}'
        c = meta['counts'][split]
        assert (c['rows'], c['examples'], c['tokens']) == (rows, len(examples), sum(len(e['ids']) for e in examples)), c
        assert sorted({e['about']['row'] for e in examples}) == [*range(rows)]
        for made in examples:
            assert {'ids', 'targets', 'about'} <= {*made} <= arguments | {'about'}, sorted(made)
            batch = {key: torch.tensor([value]) for key, value in made.items() if key != 'about'}
            _, loss = net(**batch)
            assert torch.isfinite(loss), f'{made}: loss {loss}'


def test_labels_are_those_of_all_rows_in_an_order_of_their_own(tmp_path):
    """Sorted, whichever comes first in the file; tags have both forms of each kind, also of kinds that only `val` has."""
    for lines, task, expected in (('b\tx\na\tx\nc\tx\n', 'classify', ['a', 'b', 'c']),
                                  ('x\tI-z\n\ny\tB-人\n\nz\tO\n', 'tag', ['O', 'B-z', 'I-z', 'B-人', 'I-人'])):
        for order in (lines, '\n'.join(lines.split('\n')[::-1])):
            _, meta = prepare(Settings(input=[write(tmp_path / 'a', order)], task=task, tokenizer='byte', val_fraction=0.3,
                                       out_dir=str(tmp_path / 'out')))
            assert meta['labels'] == expected, meta['labels']


def test_a_file_for_validation_leaves_all_rows_to_train_in_their_order(tmp_path):
    """--val FILE overrides --val_fraction; char knows the characters of both, bpe learns from the training rows alone."""
    train = write(tmp_path / 'a.tsv', ''.join(f'好\tab ab 句{i}\n' for i in range(9)) + '坏\tab ab\n')
    val = write(tmp_path / 'v.tsv', '好\tzz zz 月\n' * 9)
    for tokenizer in ('char', 'bpe'):
        _, meta = prepare(Settings(input=[train], val=[val], task='classify', tokenizer=tokenizer, vocab_size=380,
                                   out_dir=str(tmp_path / tokenizer)))
        assert [meta['counts'][split]['rows'] for split in ('train', 'val')] == [10, 9]
        table = prepare_data.load_tokenizer(tmp_path / tokenizer)
        for split, first in (('train', 'ab ab 句0'), ('val', 'zz zz 月')):
            made = json.loads((tmp_path / tokenizer / f'{split}.jsonl').read_bytes().split(b'\n')[0])
            assert table.decode(made['ids']) == f'[CLS]{first}[SEP]' and made['about']['text'] == first
    assert b'ab' in table._mergeable_ranks and b'zz' not in table._mergeable_ranks, [*table._mergeable_ranks][256:]


def test_preparing_again_gives_the_same_bytes(tmp_path):
    """For each task, also from a folder of files, and in the place of a folder to pre-train on."""
    write(tmp_path / 'out/train.bin', 'old')
    write(tmp_path / 'out/meta.json', '{}')
    for task, (name, text, _) in FILES.items():
        write(tmp_path / task / name, text)
        for _ in range(2):
            prepare(Settings(input=[str(tmp_path / task)], task=task, vocab_size=380, val_fraction=0.3,
                             out_dir=str(tmp_path / 'out')))
            before = contents(tmp_path / 'out')
            assert sorted(before) == ['meta.json', 'tokenizer.json', 'train.jsonl', 'val.jsonl']
        prepare(Settings(input=[str(tmp_path / task / name)], task=task, vocab_size=380, val_fraction=0.3,
                         out_dir=str(tmp_path / 'out')))
        assert {k: v for k, v in contents(tmp_path / 'out').items() if k != 'meta.json'} == {
            k: v for k, v in before.items() if k != 'meta.json'}, task


def test_a_good_run_of_a_task_says_what_it_made(tmp_path):
    """Rows, examples and labels, what was cut, the next command; silence on standard error."""
    write(tmp_path / '评.tsv', '好\t床前明月光，疑是地上霜。\n坏\tx\n' * 10)
    result = command('prepare_data.py', '--input', '评.tsv', '--task', 'classify', '--tokenizer=char', '--block-size=8',
                     '--val-fraction', 0.2, cwd=tmp_path, env=os.environ | {'PYTHONIOENCODING': 'ascii'})
    train, val, labels, cut, last = result.stdout.splitlines()
    assert result.stderr == '' and labels == 'labels: 坏, 好', result
    assert train.endswith('16 rows, 16 examples') and val.endswith('4 rows, 4 examples'), (train, val)
    assert cut.startswith('10 examples ') and '--block_size 8' in cut, cut
    assert last.startswith(os.path.join('data', '评') + ': char tokenizer') and last.endswith('--dataset 评'), last


# Rows that cannot be used: (task, {file: text}, flags, where it is, what the line must say besides)
GOOD = {'v.tsv': '好\t一\n坏\t二\n', 'v.conll': '北京\tB-地\nis\tO\n', 'v.jsonl': '{"label": "好", "text": "一"}\n\n'}
ANSWER = '"id": "q1", "question": "谁", "answers": [{"answer_start": 1, "text": "月"}]'
QUESTION = '{"data": [{"paragraphs": [\n{"context": "明月", "qas": [\n{' + ANSWER + '}]},\n{"context": "x", "qas": [' \
    '{"id": "q2", "question": "x?", "answers": []}]}]}]}'
MALFORMED = {
    'a missing tab': ('classify', {'a.tsv': '好\t一\n\n没有\n'}, [], 'a.tsv, line 3: ', 'has 1 column'),
    'spaces for a tab': ('classify', {'a.tsv': '好    一\n'}, [], 'a.tsv, line 1: ', 'has 1 column'),
    'four columns': ('classify', {'a.tsv': '好\t一\r\n好\t一\t二\t三\r\n'}, [], 'a.tsv, line 2: ', 'has 4 columns'),
    'no text': ('classify', {'a.tsv': '好\t一\n好\t\u3000\n'}, [], 'a.tsv, line 2: ', 'empty'),
    'no label': ('classify', {'a.tsv': '\t一\n'}, [], 'a.tsv, line 1: ', 'empty'),
    'no second text': ('classify', {'a.tsv': '好\t一\t\n'}, [], 'a.tsv, line 1: ', 'empty'),
    'a missing tab in the second file': ('classify', {'f/1.tsv': GOOD['v.tsv'], 'f/2.tsv': '没有'}, [], '2.tsv, line 1: ',
                                         'has 1 column'),
    'a missing tab in validation': ('classify', {'a.tsv': GOOD['v.tsv'], 'v.tsv': '好\t一\n没有\n'}, ['--val', 'v.tsv'],
                                    'v.tsv, line 2: ', 'has 1 column'),
    'an unknown label': ('classify', {'a.tsv': GOOD['v.tsv'], 'v.tsv': '好\t一\n\n妙\t二\n'}, ['--val', 'v.tsv'],
                         'v.tsv, line 3: ', "'妙' is unknown: the training data has 坏, 好"),
    'not UTF-8': ('classify', {'a.tsv': '好\t一\n'.encode() + b'\xff'}, [], 'a.tsv', 'the byte at offset 8'),
    'not JSON': ('classify', {'a.jsonl': GOOD['v.jsonl'] + '好\t一\n'}, [], 'a.jsonl, line 3: ', 'JSON'),
    'JSON without a label': ('classify', {'a.jsonl': GOOD['v.jsonl'] + '{"text": "二"}'}, [], 'a.jsonl, line 3: ', 'label'),
    'JSON without a text': ('classify', {'a.jsonl': GOOD['v.jsonl'] + '{"label": "好"}'}, [], 'a.jsonl, line 3: ', '"text"'),
    'a label that is a number': ('classify', {'a.jsonl': '{"label": 1, "text": "二"}'}, [], 'a.jsonl, line 1: ', '"label"'),
    'a text that is a list': ('classify', {'a.jsonl': '{"label": "好", "text": ["二"]}'}, [], 'a.jsonl, line 1: ', '"text"'),
    'a row that is a list': ('classify', {'a.jsonl': '["好", "二"]'}, [], 'a.jsonl, line 1: ', ''),
    'a second text that is null': ('classify', {'a.jsonl': '{"label": "好", "text": "二", "text_b": null}'}, [],
                                   'a.jsonl, line 1: ', 'must be strings'),
    'half a character': ('classify', {'a.jsonl': '{"label": "好", "text": "\\ud83d"}'}, [], 'a.jsonl, line 1: ', ''),
    'half a character in the second text': ('classify', {
        'a.jsonl': GOOD['v.jsonl'] + '{"label": "好", "text": "一", "text_b": "\\ud83d"}'}, [], 'a.jsonl, line 3: ', ''),
    'nothing': ('classify', {'a.tsv': '\n\n'}, [], 'a.tsv', 'no rows for a train split'),
    'one row': ('classify', {'a.tsv': '好\t一\n'}, [], 'a.tsv', 'no rows for a train split'),
    'nothing in validation': ('classify', {'a.tsv': GOOD['v.tsv'], 'v.tsv': ''}, ['--val', 'v.tsv'], 'v.tsv',
                              'no rows for a val split'),
    'no tag': ('tag', {'a.conll': 'EU\tB-组织\n说\n'}, [], 'a.conll, line 2: ', 'column 2'),
    'no tag in the first line': ('tag', {'a.conll': '说\n'}, [], 'a.conll, line 1: ', 'column 2'),
    'a column too many': ('tag', {'a.conll': 'EU\tB-组织\n\n说\tVB\tO\n'}, [], 'a.conll, line 3: ', 'column 2'),
    'a column too few': ('tag', {'a.conll': 'EU NNP B-组织\n说 O\n'}, [], 'a.conll, line 2: ', 'column 3'),
    'no token': ('tag', {'a.conll': 'EU\tO\n\tO\n'}, [], 'a.conll, line 2: ', 'must be a token'),
    'an empty tag': ('tag', {'a.conll': 'EU\tO\n说\t\n'}, [], 'a.conll, line 2: ', 'its tag'),
    'a tag without a kind': ('tag', {'a.conll': 'EU\tO\n说\tB-\n'}, [], 'a.conll, line 2: ', 'B-kind'),
    'a tag of another scheme': ('tag', {'a.conll': 'EU\tO\n说\tE-组织\n'}, [], 'a.conll, line 2: ', 'B-kind'),
    'a kind alone': ('tag', {'a.conll': 'EU\t组织\n'}, [], 'a.conll, line 1: ', 'B-kind'),
    'an unknown kind': ('tag', {'a.conll': GOOD['v.conll'], 'v.conll': 'x\tO\n\nEU\tB-组织\n'}, ['--val', 'v.conll'],
                        'v.conll, line 3: ', "'B-组织' is unknown: the training data has O, B-地, I-地"),
    'JSON for tags': ('tag', {'a.conll': GOOD['v.jsonl']}, [], 'a.conll, line 1: ', ''),
    'questions that are not JSON': ('qa', {'a.json': QUESTION[:-1]}, [], 'a.json', 'JSON'),
    'questions without data': ('qa', {'a.json': '{"rows": []}'}, [], 'a.json', '"data"'),
    'questions in a list': ('qa', {'a.json': '[1]'}, [], 'a.json', '"data"'),
    'questions without bottom': ('qa', {'a.json': '[' * 100_000}, [], 'a.json', ''),
    'data that is a number': ('qa', {'a.json': '{"data": 5}'}, [], 'a.json', 'SQuAD'),
    'no questions': ('qa', {'a.json': '{"data": []}'}, [], 'a.json', 'no rows'),
    'an answer that stands elsewhere': ('qa', {'a.json': QUESTION.replace(': 1,', ': 0,')}, [], 'a.json, line 3 ',
                                        "'月' does not stand at its answer_start 0, where the context has '明'"),
    'a wrong answer of a known question': ('qa', {'a.json': QUESTION.replace(': 1,', ': 0,')}, [], 'line 3 ', 'question q1'),
    'an answer behind the end': ('qa', {'a.json': QUESTION.replace(': 1,', ': 9,')}, [], 'a.json, line 3 ', "has ''"),
    'an answer before the beginning': ('qa', {'a.json': QUESTION.replace(': 1,', ': -1,')}, [], 'a.json, line 3 ', ' -1'),
    'an empty answer': ('qa', {'a.json': QUESTION.replace('"月"', '""')}, [], 'a.json, line 3 ', "the answer ''"),
    'a place that is text': ('qa', {'a.json': QUESTION.replace(': 1,', ': "1",')}, [], 'a.json, line 3 ', ''),
    'an answer that is a number': ('qa', {'a.json': QUESTION.replace('"月"', '5')}, [], 'a.json, line 3 ', ''),
    'answers that are null': ('qa', {'a.json': QUESTION.replace('[{"a', 'null, "x": [{"a')}, [], 'a.json, line 3 ', ''),
    'an answer without a place': ('qa', {'a.json': QUESTION.replace('answer_start', 'begin')}, [], 'a.json, line 3 ', ''),
    'a question without an id': ('qa', {'a.json': QUESTION.replace('"id"', '"name"')}, [], 'a.json', "'id'"),
    'no context': ('qa', {'a.json': QUESTION.replace('"context"', '"text"')}, [], 'a.json', "'context'"),
    'a question that is a number': ('qa', {'a.json': QUESTION.replace('"谁"', '5')}, [], 'a.json, line 3 ', ''),
    'a context that is a list': ('qa', {'a.json': QUESTION.replace('"明月"', '["明", "月"]')}, [], 'a.json, line 3 ', ''),
    'half a character in a context': ('qa', {'a.json': QUESTION.replace('明月', '明月\\ud83d')}, [], 'a.json, line 3 ', ''),
    'half a character in a question': ('qa', {'a.json': QUESTION.replace('谁', '\\ud83d')}, [], 'a.json, line 3 ', ''),
    'an answer longer than a window': ('qa', {'a.json': QUESTION.replace('明', '明' * 9).replace(': 1,', ': 0,').replace(
        '"月"', f'"{"明" * 9}月"'), 'v.json': QUESTION}, ['--val', 'v.json', '--block_size', '12', '--tokenizer', 'char'],
        'a.json, line 3 ', 'has 10 tokens, more than a window of block_size=12'),
}


@pytest.mark.parametrize('name', MALFORMED)
def test_a_malformed_row_is_named_with_its_file_and_line(tmp_path, monkeypatch, capsys, name):
    """From the command line: one line, status 2; the old data folder stays as it was, and nothing half-written is left."""
    task, files, flags, where, says = MALFORMED[name]
    for path, text in files.items():
        write(tmp_path / path, text)
    write(tmp_path / 'out/meta.json', 'the old one')
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path), sorted(os.listdir())
    source = next(iter(files)).split('/')[0]
    monkeypatch.setattr(sys, 'argv', ['prepare_data.py', '--input', source, '--task', task, '--vocab_size=370',
                                      '--out_dir', 'out', *flags])
    with pytest.raises(SystemExit) as end:
        prepare_data.run(prepare_data.main)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, '') and err.count('\n') == 1 and err.startswith('prepare_data.py: error: '), err
    assert where in err and says in err, err
    assert (contents(tmp_path), sorted(os.listdir())) == before


@pytest.mark.parametrize('name', ['a missing tab', 'an unknown kind', 'an answer that stands elsewhere'])
def test_a_malformed_row_leaves_no_folder_where_there_was_none(tmp_path, name):
    """The same as a user meets it: in a process of its own, and out_dir is new."""
    task, files, flags, where, says = MALFORMED[name]
    for path, text in files.items():
        write(tmp_path / path, text)
    before = contents(tmp_path), sorted(os.listdir(tmp_path))
    result = command('prepare_data.py', '--input', next(iter(files)), '--task', task, *flags, cwd=tmp_path, status=2)
    assert result.stdout == '' and result.stderr.count('\n') == 1, result
    assert where in result.stderr and says in result.stderr, result.stderr
    left = set(os.listdir(tmp_path)) - {'data'}                       # data/ itself may have been made
    assert contents(tmp_path) == before[0] and sorted(left) == before[1]
    assert not (tmp_path / 'data').exists() or not os.listdir(tmp_path / 'data')

# -----------------------------------------------------------------------------
# Data sets


@pytest.fixture
def mirror(tmp_path):
    """A folder that has one file, and a server on loopback that serves the folder."""
    data = b'To be, or not to be.\n' * 50
    write(tmp_path / 'mirror/some/全/plays.txt', data)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path.endswith('garbage'):
                self.wfile.write(b'this is not HTTP\r\n\r\n')
            else:
                super().do_GET()

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0),
                                         functools.partial(Quiet, directory=str(tmp_path / 'mirror'))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield str(tmp_path / 'mirror'), f'http://127.0.0.1:{server.server_port}', data
        server.shutdown()
        thread.join()


def test_a_mirror_is_a_folder_or_a_server(mirror):
    """Both give the same bytes, with or without a slash at the end; quoted names are unquoted in a folder."""
    folder, url, data = mirror
    for place in (folder, folder + '/', url, url + '/'):
        assert prepare_data.fetch('some/%E5%85%A8/plays.txt', hashlib.sha256(data).hexdigest(), place) == data


def test_a_download_that_is_not_the_expected_file_is_refused(mirror):
    """The sha256 decides, and the message shows both."""
    folder, url, data = mirror
    wrong = hashlib.sha256(b'something else').hexdigest()
    for place in (folder, url):
        with pytest.raises(ValueError, match=f'{hashlib.sha256(data).hexdigest()[:12]}.*{wrong[:12]}'):
            prepare_data.fetch('some/%E5%85%A8/plays.txt', wrong, place)


@pytest.mark.parametrize('place', ['nowhere', '{folder}', '{folder}/', '{url}', '{url}/garbage?', 'http://127.0.0.1:9',
                                   '{url}/with a space', 'http://127.0.0.1:port', 'gopher://127.0.0.1'])
def test_a_download_that_fails_names_the_mirror_flag(mirror, place):
    """Offline, missing, malformed: one ValueError that names the address and --mirror."""
    place = place.format(folder=mirror[0], url=mirror[1])
    with pytest.raises(ValueError, match='--mirror URL or FOLDER') as error:
        prepare_data.fetch('garbage' if 'garbage' in place else 'missing.txt', '0' * 64, place)
    assert str(error.value).startswith(place) and '//missing' not in str(error.value), error.value


def test_a_data_set_is_downloaded_and_prepared(tmp_path, monkeypatch, mirror):
    """shakespeare through --mirror; meta.json names the data set, and the folder keeps no more than its own files."""
    folder, url, data = mirror
    monkeypatch.setattr(prepare_data, 'SHAKESPEARE', ('some/%E5%85%A8/plays.txt', hashlib.sha256(data).hexdigest()))
    for i, place in enumerate((folder, url)):
        _, meta = prepare(Settings(dataset='shakespeare', mirror=place, tokenizer='byte', out_dir=str(tmp_path / f'out{i}')))
        assert meta['source'] == 'shakespeare' and meta['sha256'] == hashlib.sha256(data).hexdigest()
        ids = read(tmp_path / f'out{i}', 'train')[0] + read(tmp_path / f'out{i}', 'val')[0]
        assert bytes(ids[:-1]) == data and ids[-1] == 256


def test_the_real_plays_have_the_expected_sha256(tmp_path, shared):
    """The published file passes its check and comes back whole, with every character of Shakespeare in the table."""
    plays = (shared / 'data/tinyshakespeare.txt').read_bytes()
    write(tmp_path / prepare_data.SHAKESPEARE[0], plays)
    _, meta = prepare(Settings(dataset='shakespeare', mirror=str(tmp_path), tokenizer='char', out_dir=str(tmp_path / 'out')))
    assert meta['counts']['train']['characters'] + meta['counts']['val']['characters'] == len(plays) == 1_115_394
    assert meta['vocab_size'] == 65 + 105 and meta['counts']['val']['characters'] == 111_540, meta


def test_poems_become_title_lines_and_a_blank_line(tmp_path, monkeypatch):
    """All files in order, each poem a title and its lines, poems a blank line apart."""
    poems = [[{'title': '靜夜思', 'author': '李白', 'paragraphs': ['牀前看月光，疑是地上霜。', '舉頭望山月，低頭思故鄉。']},
              {'title': '無題', 'paragraphs': []}], [{'title': '春曉', 'paragraphs': ['春眠不覺曉，處處聞啼鳥。']}]]
    sums = []
    for i, part in enumerate(poems):
        data = json.dumps(part, ensure_ascii=i == 0).encode()
        sums.append(hashlib.sha256(data).hexdigest())
        write(tmp_path / prepare_data.urllib.parse.unquote(prepare_data.TANG).format(1000 * i), data)
    monkeypatch.setattr(prepare_data, 'TANG_SHA256', sums)
    assert prepare_data.tang(str(tmp_path)) == (
        '靜夜思\n牀前看月光，疑是地上霜。\n舉頭望山月，低頭思故鄉。\n\n無題\n\n春曉\n春眠不覺曉，處處聞啼鳥。\n')


MODULE = '''"""Wörter.

two
    lines
"""
raise SystemExit('imported!')
class Outer(Base):
    """A class."""
    class Inner:
        """Inside."""
        async def wait(self, *, seconds: float = 1.5) -> None:
            """Waits."""
        def silent(self): pass
def f(x, /, y=(1, 2), *args, **kwargs):
    """Says f."""
    def inner():
        """Nobody can call it."""
async def g():
    "Says g."
def bare(): 1
'''


def test_docstrings_are_those_of_the_module_its_classes_and_functions():
    """Names, arguments and texts in the order of the source; without documentation, or not Python: nothing."""
    assert prepare_data.docstrings(os.path.join('pack', 'mod.py'), MODULE.encode()) == [
        'pack.mod', ('pack.mod', 'Wörter.\n\ntwo\n    lines'), ('class Outer', 'A class.'), ('class Outer.Inner', 'Inside.'),
        ('Outer.Inner.wait(self, *, seconds: float=1.5)', 'Waits.'), ('f(x, /, y=(1, 2), *args, **kwargs)', 'Says f.'),
        ('g()', 'Says g.')]
    assert prepare_data.docstrings(os.path.join('pack', '__init__.py'), b'"""Hi."""') == ['pack', ('pack', 'Hi.')]
    assert prepare_data.docstrings('m.py', b'def f():\n "Says f."') == ['m', ('m', None), ('f()', 'Says f.')]
    for nothing in (b'', b'x = 1', b'def f(:', b'"""half', b'x = "\x00"', b'\xff\xfe'):
        assert prepare_data.docstrings('m.py', nothing) == [], nothing


def test_a_document_of_pydoc_is_a_module_with_all_that_it_says(tmp_path, monkeypatch):
    """Its name, its text, then each title with its text; it is named also where it says nothing of itself."""
    write(tmp_path / 'os.py', MODULE)
    write(tmp_path / 'm.py', 'def f():\n "Says f."')
    monkeypatch.setattr(os, '__file__', str(tmp_path / 'os.py'))
    documents = prepare_data.pydoc().split('<|endoftext|>\n')
    for document in ('os\n\nWörter.\n\ntwo\n    lines\n\nclass Outer\n\nA class.\n\nclass Outer.Inner\n\nInside.\n\n'
                     'Outer.Inner.wait(self, *, seconds: float=1.5)\n\nWaits.\n\nf(x, /, y=(1, 2), *args, **kwargs)\n\n'
                     'Says f.\n\ng()\n\nSays g.\n', 'm\n\nf()\n\nSays f.\n'):
        assert document in documents, [d for d in documents if d.startswith(document[:2])]


def test_pydoc_is_many_documents_and_imports_nothing():
    """Every topic of the manual is one, every module with documentation is one, and each is cut by a marker line."""
    from pydoc_data.topics import topics
    before = set(sys.modules)
    text = prepare_data.pydoc()
    new = {name for name in set(sys.modules) - before if not name.startswith('encodings.')}  # some source is not in UTF-8
    assert not new, f'imported: {sorted(new)}'
    documents = text.split('<|endoftext|>\n')
    assert len(documents) > 300 and len(text) > 1_000_000, f'{len(documents)} documents, {len(text):,} characters'
    assert all(document.endswith('\n') for document in documents) and '<|endoftext|>' not in ''.join(documents)
    titles = [document.split('\n')[0] for document in documents]
    missing = {*topics, 'json', 'json.decoder', 'argparse'} - set(titles)
    assert not missing, f'not there: {missing}'
    assert not [title for title in titles if title.startswith(('test.', 'idlelib.', 'site-packages'))]
    assert titles != sorted(titles), 'in alphabetical order, validation would be of another kind than training'


def test_pydoc_does_not_depend_on_the_order_of_files(tmp_path, monkeypatch):
    """File systems list folders as they like; the text is the same, and says what the files say."""
    for name in ('os.py', 'a.py', 'b/__init__.py', 'b/c.py', 'b/d.py', 'test/no.py', 'site-packages/no.py',
                 'b/__pycache__/no.py'):
        write(tmp_path / name, f'"""I am {name}."""\nraise SystemExit("imported!")\n')
    write(tmp_path / 'b/notes.txt', '"""I am no module."""')
    monkeypatch.setattr(os, '__file__', str(tmp_path / 'os.py'))
    one = prepare_data.pydoc()
    walk = os.walk
    monkeypatch.setattr(os, 'walk', lambda top: ((folder, folders, names[::-1]) for folder, folders, names in walk(top)))
    assert prepare_data.pydoc() == one
    found = sorted(regex.findall(r'I am (\S+)\.\n', one))
    assert found == ['a.py', 'b/__init__.py', 'b/c.py', 'b/d.py', 'os.py'], found


def library_of(tmp_path, monkeypatch, files):
    """A library of a few files stands in for Python's own; each would end the process if it were imported."""
    for name, text in files.items():
        write(tmp_path / 'library' / name, text)
    monkeypatch.setattr(os, '__file__', str(tmp_path / 'library/os.py'))


@pytest.mark.parametrize('name', ['pytopics', 'pytokens'])
def test_offline_data_sets_do_not_depend_on_the_order_of_files(tmp_path, monkeypatch, name):
    """The same text, however the file system lists folders, and by way of prepare() the same bytes; nothing goes online."""
    library_of(tmp_path, monkeypatch, {
        f'{package}{i}/m{j}.py': f'"""{package} {i} 说 {j}: 床前明月光 and enough words."""\nx = {j}\n'
        for package in 'ab' for i in range(8) for j in range(3)})
    monkeypatch.setattr(prepare_data.urllib.request, 'urlopen', lambda *args, **kwargs: pytest.fail('went online'))
    one = getattr(prepare_data, name)()
    walk = os.walk
    prepare(Settings(dataset=name, tokenizer='byte', out_dir=str(tmp_path / 'one')))
    monkeypatch.setattr(os, 'walk', lambda top: ((folder, folders, names[::-1]) for folder, folders, names in walk(top)))
    assert getattr(prepare_data, name)() == one and one.count('床前明月光') >= 36, one
    prepare(Settings(dataset=name, tokenizer='byte', out_dir=str(tmp_path / 'two')))
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
    assert sorted(contents(tmp_path / 'one')) == ['meta.json', 'source.txt', 'tokenizer.json', 'train.jsonl', 'val.jsonl']
    assert (tmp_path / 'one/source.txt').read_text('utf-8') == one


def test_offline_data_sets_are_the_same_in_every_process(tmp_path, monkeypatch):
    """Python orders a set of texts anew each time it starts; the data must not follow."""
    library_of(tmp_path, monkeypatch, {
        'a.py': ''.join(f'def f{i}():\n    """床前明月光 says number {i}."""\n' for i in range(30))})
    code = ('import os, prepare_data; os.__file__ = "library/os.py"; '
            'print(prepare_data.pytopics() + prepare_data.pytokens() + prepare_data.pydoc())')
    outs = [subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, check=True, timeout=300, env={
        **os.environ, 'PYTHONHASHSEED': seed, 'PYTHONPATH': str(ROOT), 'PYTHONUTF8': '1'}).stdout.decode() for seed in '12']
    assert outs[0] == outs[1] and outs[0].count('says number 7') == 2, outs[0][:300]


def test_pytopics_are_the_twelve_packages_that_say_most(tmp_path, monkeypatch):
    """A row for each different docstring of 20 characters or more, white space as single spaces; parsed, not imported."""
    files = {f'p{i:02}.py': 'raise SystemExit("imported!")\n' + ''.join(
        f'def f{j}():\n    """Function {j} of number {i}:\n\n\tworld 世界 {j}"""\n' for j in range(i)) for i in range(1, 15)}
    files['p14.py'] += ('def again():\n    """Function 0 of number 14:\n world 世界 0"""\n'
                        'def short():\n    """Too short."""\n')
    library_of(tmp_path, monkeypatch, files)
    rows = [line.split('\t') for line in prepare_data.pytopics().removesuffix('\n').split('\n')]
    assert collections.Counter(package for package, _ in rows) == {f'p{i:02}': i for i in range(3, 15)}
    assert ['p14', 'Function 0 of number 14: world 世界 0'] in rows and rows != sorted(rows), rows[:3]


def test_pytokens_are_the_words_of_source_with_their_kinds(tmp_path, monkeypatch):
    """A logical line is a text; strings and comments of several words are one entity; what is not Python is left out."""
    library_of(tmp_path, monkeypatch, {
        'a.py': 'raise SystemExit("床前 明月 光")\n# 注释 of two\nif x1 >= 2.5: pass\n', 'b.py': 'def f(:\n',
        'c.py': b'# -*- coding: latin-1 -*-\ny = "\xe9"\n', 'd.py': b'\xff\xfe z\n'})
    rows = {tuple(zip(row['tokens'], row['tags'])) for row in prepare_data.read_tagged(
        write(tmp_path / 'a.conll', prepare_data.pytokens()))}
    expected = {
        (('raise', 'B-keyword'), ('SystemExit', 'B-name'), ('(', 'O'), ('"床前', 'B-string'), ('明月', 'I-string'),
         ('光"', 'I-string'), (')', 'O')),
        (('#', 'B-comment'), ('注释', 'I-comment'), ('of', 'I-comment'), ('two', 'I-comment')),
        (('if', 'B-keyword'), ('x1', 'B-name'), ('>=', 'O'), ('2.5', 'B-number'), (':', 'O'), ('pass', 'B-keyword')),
        (('y', 'B-name'), ('=', 'O'), ('"é"', 'B-string'))}
    assert expected <= rows, f'not there: {expected - rows}'
    assert not any('z' in dict(row) for row in rows)


def test_the_offline_data_sets_of_this_python_are_large_and_clean():
    """Rows that their reader accepts, twelve packages of a like order, all kinds of tokens; nothing is imported."""
    before = set(sys.modules)
    texts = {'classify': prepare_data.pytopics(), 'tag': prepare_data.pytokens()}
    new = {name for name in set(sys.modules) - before if not name.startswith('encodings.')}  # some source is not in UTF-8
    assert not new, f'imported: {sorted(new)}'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, 'read_lines', lambda task: enumerate(texts[task].split('\n'), 1))
        labelled, tagged = ([*TASKS[task].read(task)] for task in ('classify', 'tag'))
    sizes = collections.Counter(row['label'] for row in labelled)
    assert len(sizes) == 12 and len(labelled) > 2000 and min(sizes.values()) > 50, sizes
    assert 10_000 < len(tagged) <= 12_000 and max(len(row['tokens']) for row in tagged) == 32, len(tagged)
    kinds = {tag for row in tagged for tag in row['tags']}
    assert kinds == {'O', 'B-keyword', 'B-name', 'B-number', 'B-string', 'I-string', 'B-comment', 'I-comment'}, kinds


@pytest.mark.parametrize('served', [False, True], ids=['a folder', 'a server'])
def test_rotten_tomatoes_is_decoded_shuffled_and_cut(tmp_path, monkeypatch, mirror, served):
    """Both files are cp1252, where byte 0x85 is a character and no line end; 80 % to train, the next 10 % to validate."""
    lines = {'positive': [f'good {i} caf\xe9 ' for i in range(50)] + ['so \x85 good \x85'],
             'negative': [f'bad {i}' for i in range(49)]}
    sums = {}
    for label, part in lines.items():
        data = ('\n'.join(part) + '\n').encode('latin-1')             # \x85 and \xe9 as single bytes
        path = write(tmp_path / f'mirror/films/rt.{label[:3]}', data)
        sums[label] = (os.path.relpath(path, tmp_path / 'mirror'), hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(prepare_data, 'ROTTEN_TOMATOES', sums)
    flags = Settings(dataset='rotten_tomatoes', mirror=mirror[served], tokenizer='byte', out_dir=str(tmp_path / 'out'))
    _, meta = prepare(flags)
    assert (meta['task'], meta['source'], meta['labels']) == ('classify', 'rotten_tomatoes', ['negative', 'positive'])
    assert [meta['counts'][split]['rows'] for split in ('train', 'val')] == [80, 10]
    rows = [row for name in ('source.txt', 'source.val.txt') for row in rows_of('classify', str(tmp_path / 'out' / name))]
    wanted = {('positive', f'good {i} café') for i in range(50)} | {('negative', f'bad {i}') for i in range(49)} | {
        ('positive', 'so … good …')}
    found = [(row['label'], row['text']) for row in rows]
    assert len(set(found)) == 90 and set(found) <= wanted, set(found) - wanted
    assert {'positive', 'negative'} == {label for label, _ in found[80:]} and found != sorted(found), 'not shuffled'
    everything = [(label, line.replace('\x85', '…').strip()) for label, part in lines.items() for line in part]
    random.Random(0).shuffle(everything)
    assert found == everything[:90], 'the published split is a shuffle with random.Random(0)'
    monkeypatch.setattr(prepare_data, 'ROTTEN_TOMATOES', sums | {'negative': (sums['negative'][0], '0' * 64)})
    before = contents(tmp_path / 'out')
    with pytest.raises(ValueError, match='is not the expected file'):
        prepare(flags)
    assert contents(tmp_path / 'out') == before


def test_the_real_tweets_have_the_expected_sha256(tmp_path, shared):
    """wnut17 through --mirror: the published split, 3,394 texts to train and 1,009 to validate, six kinds of names."""
    for (path, _), split in zip(prepare_data.WNUT17, ('train', 'val')):
        write(tmp_path / path, (shared / f'data/wnut17.{split}.conll').read_bytes())
    _, meta = prepare(Settings(dataset='wnut17', mirror=str(tmp_path), tokenizer='byte', block_size=64,
                               out_dir=str(tmp_path / 'out')))
    assert [meta['counts'][split]['rows'] for split in ('train', 'val')] == [3394, 1009], meta['counts']
    kinds = ['corporation', 'creative-work', 'group', 'location', 'person', 'product']
    assert meta['task'] == 'tag'
    assert meta['labels'] == ['O', *(prefix + kind for kind in kinds for prefix in ('B-', 'I-'))], meta['labels']
    assert sorted(contents(tmp_path / 'out')) == [
        'meta.json', 'source.txt', 'source.val.txt', 'tokenizer.json', 'train.jsonl', 'val.jsonl']


def test_the_real_reviews_are_the_published_split(tmp_path, shared):
    """What people compare with: 8,529 rows to train, 1,066 to validate, of both labels about half."""
    _, meta = prepare(Settings(input=[str(shared / 'data/rotten-tomatoes.train.tsv')], tokenizer='byte', task='classify',
                               val=[str(shared / 'data/rotten-tomatoes.val.tsv')], out_dir=str(tmp_path / 'out')))
    assert [meta['counts'][split]['rows'] for split in ('train', 'val')] == [8529, 1066], meta['counts']
    assert meta['labels'] == ['negative', 'positive']


def test_every_data_set_is_for_a_task_and_listed(tmp_path, monkeypatch):
    """What each is for is one of --task, those that need no network among them; the flag offers all."""
    assert {name: task for name, (task, _) in prepare_data.DATASETS.items()}.items() >= {
        'pydoc': 'lm', 'shakespeare': 'lm', 'tang': 'lm', 'pytopics': 'classify', 'rotten_tomatoes': 'classify',
        'pytokens': 'tag', 'wnut17': 'tag', 'numbers': 'seq2seq', 'multi30k': 'seq2seq'}.items()
    assert all(task in ('lm', *TASKS) for task, _ in prepare_data.DATASETS.values())
    with pytest.raises(ValueError, match='choose one of') as error:
        prepare(Settings(dataset='none'))
    assert all(name in str(error.value) for name in prepare_data.DATASETS), error.value

# -----------------------------------------------------------------------------
# Text to text

LINES = st.text(st.characters(codec='utf-8', exclude_characters='\t\n\r\ufeff'), min_size=1, max_size=20).filter(str.strip)


@given(pairs=st.lists(st.tuples(LINES, LINES), min_size=1, max_size=6), end=st.sampled_from(['\n', '\r\n']),
       marked=st.booleans(), last=st.booleans())
@example(pairs=[('e\u0301 😀', ' 二十一 '), ('a', 'b\u2028c\x85d\x0b')], end='\r\n', marked=True, last=False)
def test_pairs_come_back_whatever_is_in_them(tmp_path_factory, pairs, end, marked, last):
    """TSV with any line ends and maybe a mark at its beginning, or JSONL: source, target, file and line."""
    folder = tmp_path_factory.mktemp('pairs')
    tsv = write(folder / 'a.tsv', marked * '\ufeff' + end.join('\t'.join(pair) for pair in pairs) + last * end)
    jsonl = write(folder / 'a.jsonl', '\n'.join(json.dumps({'target': b, 'source': a}) for a, b in pairs))
    for path in (tsv, jsonl):
        assert list(TASKS['seq2seq'].read(path)) == [{'where': f'{path}, line {n}', 'source': a, 'target': b}
                                            for n, (a, b) in enumerate(pairs, 1)]


@given(source=st.text('ab人 é', max_size=12), target=st.text('ab人 é', max_size=12), block_size=st.integers(8, 20))
@example(source='twenty one', target='21', block_size=11)
@example(source='aaa', target='', block_size=8)
@example(source='', target='aaaaaaa', block_size=8)
def test_a_target_is_asked_for_one_token_ahead_and_with_its_end(source, target, block_size):
    """The decoder begins with <|endoftext|> and is to end with it; what does not fit is refused, nothing is cut."""
    # b14
    tokenizer = prepare_data.byte_tokenizer()
    special = tokenizer._special_tokens
    end_id, row = special['<|endoftext|>'], {'source': source, 'target': target}
    assert end_id != special['[PAD]'], 'an end that looks like padding is never learned'
    long = [name for name in row if len(row[name].encode()) + 1 > block_size]
    if long:
        n = len(row[long[0]].encode()) + 1
        with pytest.raises(ValueError, match=f'the {long[0]} .* has {n} tokens with its end, more than block_size='):
            prepare_data.seq2seq_examples(tokenizer, row, [], block_size)
        return
    [made] = prepare_data.seq2seq_examples(tokenizer, row, [], block_size)
    assert made['ids'] == [*source.encode(), end_id]
    assert made['decoder_ids'] == [end_id, *target.encode()] and made['targets'] == [*target.encode(), end_id]
    assert made['about'] == row
    [asked] = prepare_data.seq2seq_examples(tokenizer, {'source': source}, [], block_size)
    assert asked == {'ids': made['ids'], 'about': {'source': source}}, 'a row to be answered has no target'


def test_a_prepared_folder_of_pairs_holds_examples_that_a_model_reads(tmp_path):
    """Readable JSON, no labels, in the order of the rows; the loss of each on an encoder-decoder is a number."""
    text = ''.join(f'第{i} 句\t{i}\n' for i in range(10))
    path = write(tmp_path / 'a.tsv', text)
    _, meta = prepare(Settings(input=[path], val=[path], task='seq2seq', tokenizer='char', block_size=8,
                               out_dir=str(tmp_path / 'out')))
    assert sorted(contents(tmp_path / 'out')) == ['meta.json', 'tokenizer.json', 'train.jsonl', 'val.jsonl']
    assert (meta['task'], meta['labels'], meta['block_size']) == ('seq2seq', [], 8), meta
    assert meta['counts']['train']['rows'] == meta['counts']['train']['examples'] == 10
    net = model.build(dataclasses.replace(model.PRESETS['transformer'], n_layer=1, n_head=2, n_embd=8, block_size=8,
                                          vocab_size=meta['vocab_size']))
    lines = (tmp_path / 'out/train.jsonl').read_text('utf-8').splitlines()
    for i, line in enumerate(lines):
        made = json.loads(line)
        assert made.pop('about') == {'source': f'第{i} 句', 'target': str(i), 'row': i} and '句' in line
        _, loss = net(**{key: torch.tensor([value]) for key, value in made.items()})
        assert torch.isfinite(loss), f'{made}: loss {loss}'


PAIRS = {
    'a missing tab': ({'a.tsv': '一\t1\nno tab\n'}, [], 'a.tsv, line 2: ',
                      "'no tab' must be source<TAB>target, and has 1 column"),
    'an empty line': ({'a.tsv': '一\t1\n\n二\t2\n'}, [], 'a.tsv, line 2: ', 'source<TAB>target'),
    'an empty line at the end': ({'a.tsv': '一\t1\n\n'}, [], 'a.tsv, line 2: ', 'source<TAB>target'),
    'three columns': ({'a.tsv': '一\t1\t2\n'}, [], 'a.tsv, line 1: ', 'has 3 columns'),
    'no source': ({'a.tsv': '一\t1\n \t1\n'}, [], 'a.tsv, line 2: ', 'has an empty one'),
    'no target': ({'a.tsv': '一\t1\n一\t\u3000\n'}, [], 'a.tsv, line 2: ', 'has an empty one'),
    'in validation': ({'a.tsv': '一\t1\n', 'v.tsv': '一\t1\n一 1\n'}, ['--val', 'v.tsv'], 'v.tsv, line 2: ', '1 column'),
    'a long source': ({'a.tsv': '一\t1\n' + 'x' * 9 + '\t1\n', 'v.tsv': '一\t1\n'}, ['--val', 'v.tsv', '--block_size', '9'],
                      'a.tsv, line 2: ', "the source 'xxxxxxxxx' has 10 tokens with its end, more than block_size=9"),
    'a long target': ({'a.tsv': '一\t1\n', 'v.tsv': '一\t1\n一\t' + 'x' * 9}, ['--val', 'v.tsv', '--block_size', '9'],
                      'v.tsv, line 2: ', "the target 'xxxxxxxxx' has 10 tokens"),
    'JSON without a target': ({'a.jsonl': '{"source": "一", "target": "1"}\n{"source": "一"}\n'}, [], 'a.jsonl, line 2: ',
                              '"target"'),
    'JSON without a source': ({'a.jsonl': '{"target": "一"}\n'}, [], 'a.jsonl, line 1: ',
                              '{"source": "two", "target": "2"}'),
    'a target that is a number': ({'a.jsonl': '{"source": "一", "target": 1}\n'}, [], 'a.jsonl, line 1: ', '"target"'),
    'half a character': ({'a.jsonl': '{"source": "\\ud83d", "target": "1"}\n'}, [], 'a.jsonl, line 1: ', ''),
    'nothing': ({'a.tsv': ''}, [], 'a.tsv', 'no rows'),
}


@pytest.mark.parametrize('name', PAIRS)
def test_a_malformed_pair_is_named_with_its_file_and_line(tmp_path, monkeypatch, capsys, name):
    """One line, status 2, and nothing is left behind."""
    files, flags, where, says = PAIRS[name]
    for path, text in files.items():
        write(tmp_path / path, text)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path), sorted(os.listdir())
    monkeypatch.setattr(sys, 'argv', ['prepare_data.py', '--task', 'seq2seq', '--input', next(iter(files)), '--tokenizer',
                                      'char', '--out_dir', 'out', *flags])
    with pytest.raises(SystemExit) as end:
        prepare_data.run(prepare_data.main)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, '') and err.count('\n') == 1 and err.startswith('prepare_data.py: error: '), err
    assert where in err and says in err, err
    assert (contents(tmp_path), sorted(os.listdir())) == before


SMALL = dict(zip('one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen '
                 'seventeen eighteen nineteen'.split(), range(1, 20)))
SMALL |= dict(zip('twenty thirty forty fifty sixty seventy eighty ninety'.split(), range(20, 100, 10)))


def read_number(words):
    """Number words -> the number, word by word."""
    total, group = 0, 0
    for word in words.replace('-', ' ').split(' '):
        if word == 'hundred':
            group *= 100
        elif word in ('thousand', 'million'):
            total, group = total + group * {'thousand': 1000, 'million': 10 ** 6}[word], 0
        else:
            group += SMALL[word]
    return total + group


@given(st.integers(1, 10 ** 9 - 1))
@example(999_999)
def test_numbers_in_words_can_be_read_back(n):
    """All below a billion, without a space too many."""
    words = prepare_data.in_words(n)
    assert read_number(words) == n and words == ' '.join(words.split()), words


@pytest.mark.parametrize('n, words', [(1, 'one'), (10, 'ten'), (19, 'nineteen'), (20, 'twenty'), (21, 'twenty-one'),
                                      (100, 'one hundred'), (101, 'one hundred one'), (110, 'one hundred ten'),
                                      (1000, 'one thousand'), (40_013, 'forty thousand thirteen'),
                                      (999_999, 'nine hundred ninety-nine thousand nine hundred ninety-nine')])
def test_numbers_in_words_by_hand(n, words):
    """As one says them."""
    assert prepare_data.in_words(n) == words


def test_every_row_of_numbers_is_right():
    """20,000 different rows: all below 1,000, and of four to six digits; the same every time, in no order of size."""
    text = prepare_data.numbers()
    rows = [line.split('\t') for line in text.removesuffix('\n').split('\n')]
    assert text.endswith('\n') and text == prepare_data.numbers() and len(rows) == 20_000
    for words, digits in rows:
        assert digits == str(read_number(words)), (words, digits)
    found = [int(digits) for _, digits in rows]
    assert len(set(found)) == 20_000 and set(range(1, 1000)) <= set(found) and max(found) < 10 ** 6
    lengths = {n: sum(len(digits) == n for _, digits in rows) for n in range(1, 7)}
    assert min(lengths[n] for n in (4, 5, 6)) > 4000, lengths
    assert sum(a < b for a, b in zip(found, found[1:])) < 11_000, 'the rows stand in an order of size'


def test_multi30k_is_downloaded_unpacked_and_paired(tmp_path, monkeypatch):
    """Four packed files through --mirror; sides are paired line by line, and space within a caption is a single one."""
    sides = {('train', 'en'): ['Two  dogs\trun .', 'A  man .'] * 3,
             ('train', 'de'): ['Zwei Hunde  laufen .', 'Ein Mann .'] * 3,
             ('val', 'en'): ['A girl.'], ('val', 'de'): ['Ein Mädchen.\u2028']}
    digests = {}
    for (split, language), lines in sides.items():
        data = gzip.compress('\n'.join([*lines, '']).encode())
        write(tmp_path / 'mirror' / prepare_data.MULTI30K.format(split, language), data)
        digests[split, language] = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(prepare_data, 'MULTI30K_SHA256', digests)
    flags = dict(dataset='multi30k', mirror=str(tmp_path / 'mirror'), tokenizer='byte')
    _, meta = prepare(Settings(**flags, out_dir=str(tmp_path / 'out')))
    assert (meta['task'], meta['source']) == ('seq2seq', 'multi30k')
    pairs = 'Two dogs run .\tZwei Hunde laufen .\nA man .\tEin Mann .\n' * 3
    assert (tmp_path / 'out/source.txt').read_text('utf-8') == pairs
    assert (tmp_path / 'out/source.val.txt').read_text('utf-8') == 'A girl.\tEin Mädchen.\n'
    assert {split: c['rows'] for split, c in meta['counts'].items()} == {'train': 6, 'val': 1}
    monkeypatch.setitem(digests, ('val', 'de'), '0' * 64)
    with pytest.raises(ValueError, match=r'val\.de\.gz is not the expected file.*--mirror'):
        prepare(Settings(**flags, out_dir=str(tmp_path / 'out2')))
    assert not (tmp_path / 'out2').exists()


def test_a_data_set_knows_its_task(tmp_path):
    """numbers for another task is refused; the flag may be left out."""
    with pytest.raises(ValueError, match='--task lm: numbers is for seq2seq'):
        prepare(Settings(dataset='numbers', task='lm', out_dir=str(tmp_path / 'out')))

# -----------------------------------------------------------------------------
# Flags


@dataclasses.dataclass
class Flags:
    max_iters: int = flag(5, 'steps, 100% of them', low=0)
    rate: float = flag(0.5, 'speed', above=0, below=1)
    share: float = flag(1.0, 'part', low=0, high=1)
    wait: float = flag(1.0, 'seconds', low=0)
    shift: float = flag(0.0, 'without bounds')
    compile: bool = flag(True, 'faster')
    color: str = flag('red', 'paint', choices=('red', 'blue'))
    name: str = flag('', 'anything')
    texts: list = flag([], 'files')
    decay: int = flag(None, 'derived', low=1, kind=int)


def parsed(*argv):
    return read_flags(argv, 'About.', {'flags': Flags})


@given(st.integers(-10**9, 10**9), st.floats(allow_nan=False), st.text(st.characters(exclude_categories=['Cs'])))
def test_a_flag_may_be_written_in_three_ways(n, x, text):
    """A space, an equals sign, dashes in the name: the same value of the same type."""
    for name in ('--max_iters', '--max-iters'):
        for argv in ([name, str(n)], [f'{name}={n}']):
            assert parsed(*argv, f'--rate={x!r}', f'--name={text}') == {'max_iters': n, 'rate': x, 'name': text}, argv
    assert type(parsed('--rate', '1')['rate']) is float


def test_only_flags_that_were_given_are_returned():
    """Who calls knows the defaults, and must be able to tell them from what was asked for."""
    assert parsed() == {}
    assert parsed('--decay', '3', '--texts', 'a', 'b', '--color', 'blue', '--texts=c') == {
        'decay': 3, 'texts': ['a', 'b', 'c'], 'color': 'blue'}
    assert Flags().texts is not Flags().texts, 'a list of defaults must not be shared'


@pytest.mark.parametrize('word, value', [
    ('--compile', True), ('--compile=True', True), ('--compile=yes', True), ('--compile=1', True), ('--compile=TRUE', True),
    ('--no-compile', False), ('--no_compile', False), ('--compile=False', False), ('--compile=no', False),
    ('--compile=0', False)])
def test_yes_and_no_have_many_forms(word, value):
    """--compile, --no-compile, --compile=False, --compile False."""
    assert parsed(word) == {'compile': value}
    assert parsed(*word.split('='), '--max_iters', '3') == {'compile': value, 'max_iters': 3}


@pytest.mark.parametrize('argv, says', [
    (['--max_iter', '3'], 'unknown flag --max_iter: did you mean --max_iters?'),
    (['--rat=3'], 'unknown flag --rat: did you mean --rate?'),
    (['--zzz'], 'unknown flag --zzz: see --help'),
    (['--no-zzz'], 'unknown flag --no-zzz: see --help'),
    (['--max_iters', 'many'], '--max_iters: many is not a whole number'),
    (['--max_iters', '1e3'], '--max_iters: 1e3 is not a whole number, such as 1000'),
    (['--max_iters', '2.5'], '--max_iters: 2.5 is not a whole number, such as 2'),
    (['--max_iters', 'nan'], '--max_iters: nan is not a whole number'),
    (['--max_iters=inf'], '--max_iters: inf is not a whole number'),
    (['--max_iters='], '--max_iters:  is not a whole number'),
    (['--max_iters'], '--max_iters: expected one argument'),
    (['--rate', 'fast'], '--rate: fast is not a number'),
    (['--compile', 'maybe'], '--compile: maybe is neither True nor False'),
    (['stray'], 'stray belongs to no flag: see --help'),
    (['--max_iters', '3', '世界'], '世界 belongs to no flag: see --help'),
])
def test_a_wrong_flag_is_named_with_what_would_be_right(argv, says):
    """One sentence: the flag, the value, the remedy."""
    with pytest.raises(ValueError) as error:
        parsed(*argv)
    assert str(error.value) == says


@pytest.mark.parametrize('name, good, bad, says', [
    ('max_iters', [0, 10**9], [-1], 'at least 0'),
    ('rate', [1e-9, 0.999], [0.0, 1.0, -1.0, float('nan'), float('inf')], 'above 0 and below 1'),
    ('share', [0.0, 1.0, 1], [-0.1, 1.1, float('nan'), float('-inf'), 10**400], 'at least 0 and at most 1'),
    ('wait', [0.0, 1e300], [-1e-9, float('nan'), float('inf')], 'at least 0'),
    ('shift', [-1e300, 0.0], [float('nan'), float('inf'), float('-inf')], 'must be finite'),
    ('color', ['red', 'blue'], ['green', ''], 'choose one of red, blue'),
    ('decay', [None, 1], [0], 'at least 1'),
])
def test_bounds_name_the_flag_and_the_value(name, good, bad, says):
    """`low` and `high` are allowed themselves, `above` and `below` are not; nan and infinity never are."""
    for value in good:
        prepare_data.check_flags(Flags(**{name: value}))
    for value in bad:
        with pytest.raises(ValueError) as error:
            prepare_data.check_flags(Flags(**{name: value}))
        assert f'--{name} {value}: ' in str(error.value) and says in str(error.value), error.value


def test_help_names_every_flag_and_its_default(tmp_path):
    """--help exits with 0, shows the header, each flag, each default."""
    out = command('prepare_data.py', '--help', cwd=tmp_path).stdout
    assert 'python prepare_data.py --dataset pydoc' in out
    flat = ' '.join(out.split())
    for f in dataclasses.fields(Settings):
        assert f'--{f.name} ' in flat, f'{f.name} is not in --help'
        assert f.default in ('', dataclasses.MISSING) or f'[{f.default!r}]' in flat, f'{f.name}: no default in --help'


def test_progress_is_silent_where_nobody_watches(capsys):
    """A log file or a pipe gets no live line."""
    prepare_data.progress('half of it')
    prepare_data.progress('')
    assert capsys.readouterr() == ('', '')


def test_progress_writes_one_line_over_again_on_a_terminal(monkeypatch, capsys):
    """Never wider than the terminal, no line end, and an empty text clears it."""
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    monkeypatch.setenv('COLUMNS', '10')
    prepare_data.progress('0123456789abc')
    prepare_data.progress('')
    assert capsys.readouterr() == ('', '\r012345678\x1b[K\r\x1b[K')


# -----------------------------------------------------------------------------
# Tokens to look at, and a rule that stands only in the text


@given(text=st.text(max_size=20), seed=st.integers(0, 3))
def test_the_steps_that_are_shown_end_in_the_tokens_of_the_text(text, seed):
    """Each step joins two neighbours into a token of the table; the last is what the encoder gives."""
    words = ['the cat sat on the mat, ', '明月几时有，把酒问青天。明月', '🦊🦊 fox e\u0301 ', 'aaaa abab '][seed]
    tokenizer = prepare_data.bpe_tokenizer([20 * words], 256 + 105 + 30)
    text = words[:5] + text.encode('utf-8', 'ignore').decode()
    *steps, last = prepare_data.steps_of(tokenizer, text)
    ids = tokenizer.encode_ordinary(text)
    assert last == f"{len(ids):,} tokens: " + ', '.join(f'{prepare_data.spell_token(tokenizer, i)} {i}' for i in ids)
    joins = [int(line.rpartition(' ')[2]) for line in steps if ' = token ' in line]
    assert len(joins) == len(text.encode()) - len(ids), f'{len(joins)} joins make {len(ids)} tokens of {text!r}'
    assert all(rank in tokenizer._mergeable_ranks.values() for rank in joins)


@pytest.mark.parametrize('flags, said', [
    (['--tokenizer', 'byte'], '4 tokens: T 84, h 104, ‹C3› 195, ‹A9› 169'),
    (['--tokenizer', 'char'], '3 tokens: T 0, h 1, é 2'), (['--out_dir', 'data/d'], "T + h = token 256")])
def test_show_prints_how_a_text_becomes_tokens_and_writes_nothing(tmp_path, monkeypatch, capsys, flags, said):
    """With a tokenizer that needs no text, or that of a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'd.txt').write_text(9 * 'Thé Th ', encoding='utf-8')
    prepare_data.prepare(prepare_data.Settings(input=['d.txt'], vocab_size=400))
    before = sorted(tmp_path.rglob('*'))
    prepare_data.main(['--show', 'Thé', *flags])
    assert said in capsys.readouterr().out
    assert sorted(tmp_path.rglob('*')) == before


def test_show_names_what_is_missing(tmp_path, monkeypatch):
    """A bpe must have learned from a text."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='--dataset pydoc'):
        prepare_data.main(['--show', 'Thé'])


def test_in_recall_a_letter_has_one_digit_within_a_document_and_others_elsewhere():
    """Eight letters, thirty pairs; nothing of a document can be known from another one."""
    train_text, val_text = prepare_data.recall()
    documents = [text.strip('\n') for text in val_text.split('<|endoftext|>\n')]
    assert len(documents) == 1000 and train_text.count('<|endoftext|>') == 39_999
    rules = [dict(zip(d[::2], d[1::2])) for d in documents]
    for d, rule in zip(documents, rules):
        assert len(d) == 2 * prepare_data.SHOTS and len(rule) <= 8 and d[::2].isalpha() and d[1::2].isdigit()
        assert all(rule[a] == b for a, b in zip(d[::2], d[1::2])), f'{d}: a letter has two digits'
    same = [a[letter] == b[letter] for a, b in itertools.pairwise(rules) for letter in a.keys() & b.keys()]
    assert 0.07 < np.mean(same) < 0.13, f'{np.mean(same)}: a rule is to be had from the document before'


def test_json_is_utf8_whatever_the_platform_prefers(tmp_path):
    """As on Windows, where the encoding of the platform is another one."""
    code = ("import locale, prepare_data as p; assert locale.getencoding() != 'utf-8'; text = {'\\u6625': '\\xe9'}; "
            "p.write_json('a.json', text); assert p.read_json('a.json') == text")
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, encoding='utf-8')
    assert result.returncode == 0, result.stderr


def test_run_works_outside_of_the_main_thread(monkeypatch):
    """Only a main thread may set a handler of signals; elsewhere there is none."""
    monkeypatch.setattr(sys, 'argv', ['x.py', 'a'])
    seen = []
    thread = threading.Thread(target=prepare_data.run, args=(seen.append,))
    thread.start()
    thread.join()
    assert seen == [['a']]
