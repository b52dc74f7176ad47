"""
Promises of prepare_data.py: text becomes ids and comes back unchanged, however it is cut; labelled
rows become examples that a model reads; a user's mistake is one clear line, and nothing is lost.
"""

import collections
import dataclasses
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import regex
import torch
from conftest import ROOT, command, one_line, refused
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare_data
from prepare_data import (
    IGNORE_INDEX, TASKS, Settings, Tokenizer, check_flags, flag, prepare, read_flags)

SAMPLE = 3 * 'It was the best of times and worst. 床前明月光，疑是地上霜。 Les élèves 😀, e\u0301! '
MIXED = st.text(st.sampled_from("ab .'1é世界明月😀\u0301\u200d\u3000\n")
                | st.characters(codec='utf-8'), max_size=60)
WORD = st.text(st.sampled_from("ab.'1é世界明月😀") | st.characters(codec='utf-8'), min_size=1,
               max_size=9).filter(lambda word: not any(c.isspace() for c in word))
CHAR = prepare_data.char_tokenizer
BYTE = prepare_data.byte_tokenizer()

@pytest.fixture(scope='module')
def bpe():
    return prepare_data.bpe_tokenizer([SAMPLE], 500)

@pytest.fixture(scope='module')
def gpt2(shared):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(shared / 'tiktoken_cache'))
        return prepare_data.gpt2_tokenizer()

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)

def contents(folder):
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob('*')) if p.is_file()}

def ids_of(folder, split):
    meta = json.loads((folder / 'meta.json').read_bytes())
    return np.fromfile(folder / f'{split}.bin', meta['dtype']).tolist()

# -----------------------------------------------------------------------------
# Tokenizers

def test_gpt2_without_a_network_is_named(monkeypatch):
    monkeypatch.setattr(prepare_data.tiktoken, 'get_encoding', None)
    with pytest.raises(ValueError, match='gpt2 cannot be downloaded'):
        prepare_data.gpt2_tokenizer()

@given(st.text())
@example('Hello, 世界! 😀 cafe\u0301\r\n\t\x00 <|endoftext|>[PAD]')
@example('aaaa' * 50 + '👩\u200d👩\u200d👧 \u3000\ufeff')
def test_any_text_comes_back(bpe, gpt2, text):
    """encode and decode are inverse, and no text becomes a special token."""
    for tokenizer in (CHAR(set(text) | {'x'}), BYTE, bpe, gpt2):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32 and ids.ndim == 1
        assert tokenizer.decode(ids.tolist()) == text, tokenizer.name
        assert b''.join(map(tokenizer.token_bytes, ids.tolist())).decode() == text
        assert not {*ids.tolist()} & {*tokenizer.special.values()}, tokenizer.name
        assert [i.tolist() for i in tokenizer.encode_batch([text, 'x'])][0] == ids.tolist()

def test_ids_are_the_obvious_ones(bpe, gpt2):
    """char: rank in the sorted alphabet; byte: the byte; gpt2: OpenAI's; special ids behind."""
    assert CHAR('世ba').encode('ab世a').tolist() == [0, 1, 2, 0]
    assert BYTE.encode('a世').tolist() == [97, 0xE4, 0xB8, 0x96]
    assert gpt2.encode('Hello world').tolist() == [15496, 995]
    assert gpt2.end_id == 50256 and gpt2.n_vocab == 50257 + 104
    for tokenizer in (CHAR('ab世'), BYTE, bpe):
        special = sorted(tokenizer.special.values())
        assert special == list(range(tokenizer.n_vocab - 105, tokenizer.n_vocab)), tokenizer.name
        assert (tokenizer.end_id, tokenizer.pad_id) == (special[0], special[1])
        assert tokenizer.start_id == tokenizer.end_id and tokenizer.end_ids == [special[0]]
        with pytest.raises(ValueError, match='no token <no>'):
            tokenizer.id('<no>')

@pytest.mark.parametrize('vocab_size', [361, 362, 400])
def test_a_bpe_vocabulary_counts_everything(vocab_size):
    assert prepare_data.bpe_tokenizer([SAMPLE], vocab_size).n_vocab == vocab_size
    assert max(map(len, prepare_data.bpe_tokenizer(['ab' * 999], 999).ranks)) <= 100  # it is cut
    with pytest.raises(ValueError, match=r'--vocab_size 360.*at least 361'):
        prepare_data.bpe_tokenizer([SAMPLE], 360)

def joined(tokens, pair):
    """[a, b, c, a, b], (a, b) -> [ab, c, ab]"""
    out, at = [], 0
    while at < len(tokens):
        size = 2 if tuple(tokens[at : at + 2]) == pair else 1
        out.append(b''.join(tokens[at : at + size]))
        at += size
    return out

def slow_bpe(counts, n_tokens):
    """The merges of train_bpe, all pairs counted from scratch each time."""
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

@settings(max_examples=80)
@given(
    st.sampled_from(['a', 'ab', 'abc ', 'é。a ']).flatmap(lambda few: st.text(few, max_size=120)),
    st.integers(256, 300), st.text('ab c', max_size=40))
@example('aaaa aaaa aaa', 300, 'aaaaaaa')  # neighbours overlap
@example('ab ba ab ba', 300, 'abba')  # equals: the smaller bytes first
def test_train_bpe_is_the_slow_one_and_its_merges_are_applied_in_order(text, n_tokens, other):
    """The fast trainer equals counting from scratch, and its merges encode as by hand."""
    find = regex.compile(prepare_data.WORDS).findall
    merges = slow_bpe(collections.Counter(find(text)), n_tokens)
    ranks = prepare_data.train_bpe(collections.Counter(find(text)), n_tokens)
    assert list(ranks) == [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    assert list(ranks.values()) == list(range(len(ranks)))
    tokenizer = Tokenizer('bpe', prepare_data.WORDS, ranks)
    for piece in find(text + other):
        tokens = [bytes([b]) for b in piece.encode()]
        for pair in merges:
            tokens = joined(tokens, pair)
        assert [tokenizer.token_bytes(i) for i in tokenizer.encode(piece).tolist()] == tokens, piece

@pytest.mark.parametrize('words', [
    'नई दिल्ली भारत', 'தமிழ் மொழி', 'cafe\u0301 nai\u0308ve', 'שָׁלוֹם'], ids=ascii)
def test_a_word_keeps_its_marks(words):
    pieces = regex.findall(prepare_data.WORDS, f'{words}। ै')
    assert pieces == [*regex.findall(' ?[^ ]+', words), '।', ' ै']

def test_a_tokenizer_survives_json_and_damage_is_refused(tmp_path, bpe):
    for tokenizer in (CHAR('ab世'), BYTE, bpe):
        saved = tokenizer.to_dict()
        again = Tokenizer.from_dict(json.loads(json.dumps(saved)))
        assert again.to_dict() == saved
        assert again.encode('ab').tolist() == tokenizer.encode('ab').tolist()
        with pytest.raises(ValueError):  # half of a surrogate pair, which JSON can hold, is no text
            again.encode('a\ud83d')
        (tmp_path / 'tokenizer.json').write_text(json.dumps(saved), encoding='utf-8')
        assert prepare_data.load_tokenizer(tmp_path).to_dict() == saved
        for key in set(saved) - {'format'}:
            lacking = {name: value for name, value in saved.items() if name != key}
            (tmp_path / 'tokenizer.json').write_text(json.dumps(lacking), encoding='utf-8')
            with pytest.raises(ValueError, match=key):
                prepare_data.load_tokenizer(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{"format', encoding='utf-8')
    with pytest.raises(ValueError, match='damaged'):
        prepare_data.load_tokenizer(tmp_path)
    (tmp_path / 'tokenizer.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'no tokenizer\.json'):
        prepare_data.load_tokenizer(tmp_path)

@given(
    st.text('ab', max_size=9), st.characters(codec='utf-8', exclude_characters='ab'), st.text('ab'))
def test_an_unknown_character_is_named_with_its_place(before, unknown, after):
    """tiktoken would panic; here it is a ValueError with the character and where it stands."""
    text = before + unknown + after
    message = one_line(ValueError, CHAR('ab').encode, text)
    assert repr(unknown) in message and f'character {len(before) + 1} ' in message
    assert message.endswith(repr(text[:len(before) + 20]))

@settings(max_examples=40)
@given(MIXED)
@example('世界😀 cafe\u0301\r\n <|endoftext|>👩\u200d👩\u200d👧》。เมือง ເມືອງ မြို့')
def test_offsets_slice_the_original_text(bpe, gpt2, text):
    """The slice of a token is every character it has a part of, or one sign of CJK; no gaps."""
    owner = [i for i, c in enumerate(text) for _ in c.encode()]  # of every byte, the character
    across = Tokenizer('bpe', prepare_data.WORDS, BYTE.ranks | {'มื'.encode()[2:4]: 256})
    for tokenizer in (CHAR(set(text) | {'x'}), BYTE, bpe, gpt2, across):
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert offsets.shape == (len(ids), 2)
        at = 0
        for i, (start, end) in zip(ids.tolist(), offsets.tolist()):
            part = tokenizer.token_bytes(i)
            assert (start, end) == (owner[at], owner[at + len(part) - 1] + 1), tokenizer.name
            at += len(part)
            assert end - start == 1 or not {*'》。มืມຂခ'} & {*text[start:end]}
        assert at == len(owner), tokenizer.name

@given(MIXED)
def test_the_merges_that_are_shown_end_in_the_tokens_of_the_text(bpe, text):
    """--show: each step merges two neighbours; the last is what the encoder gives."""
    *steps, last = prepare_data.explain(bpe, text)
    ids = bpe.encode(text).tolist()
    shown = [prepare_data.render_token(bpe, i) for i in ids]
    assert last == f'{len(ids):,} tokens: ' + ', '.join(f'{a} {i}' for a, i in zip(shown, ids))
    final = [line for line, after in zip(steps, [*steps[1:], 'end'])
             if line.startswith('    ') and not after.startswith('    ')]
    assert [part for line in final for part in line[4:44].split() if part in shown] or not ids
    assert all(token.isprintable() for token in shown)
    two = Tokenizer('bpe', prepare_data.WORDS, BYTE.ranks | {b'bc': 256, b'ab': 257})
    *_, merged, _ = prepare_data.explain(two, 'abc')
    assert merged.split() == 'a bc b + c = token 256'.split()

# -----------------------------------------------------------------------------
# Text to a folder

@settings(max_examples=40)
@given(st.lists(
    st.sampled_from(['a> b', 'x\n', '\n', '  ', "it's 12", '。世', '\n\n', '\t']), max_size=60),
    st.integers(1, 20))
def test_pieces_are_cut_where_no_token_crosses(bpe, parts, size):
    """However a text is cut for reading, its ids are those of the whole; nothing is lost."""
    text = ''.join(parts)
    pieces = list(prepare_data.safe_pieces([text[i : i + 3] for i in range(0, len(text), 3)], size))
    assert ''.join(pieces) == text
    whole = bpe.encode(text).tolist()
    if all(len(piece) < 2 * size for piece in pieces):  # else it had to be cut anywhere
        assert not any(piece.endswith('>') for piece in pieces[:-1]), 'it would end a document'
        assert [i for piece in pieces for i in bpe.encode(piece).tolist()] == whole

def test_files_folders_rows_and_markers_begin_documents(tmp_path, capsys):
    """Each document ends in one <|endoftext|>; hidden files and empty documents are left out."""
    marker = '<|endoftext|>\n'
    write(tmp_path / 'in/a.txt', f'one\n{marker}<|endoftext|> \t\ntwo\r\n\r\nstill two{marker}')
    write(tmp_path / 'in/b/wiki_00', '{ "text" : "three\\n<|endoftext|>\\n"}\n\n{"text": ""}\n')
    write(tmp_path / 'in/.hidden', 'no')
    many = [write(tmp_path / f'many/{i}.txt', 'x') for i in range(10, 30)]
    for name in 'xy':  # links in a circle, 2 ** 40 ways long
        os.symlink('.', tmp_path / f'many/{name}', target_is_directory=True)
    assert prepare_data.find_files([str(tmp_path / 'many'), many[3]]) == many  # each file once
    os.symlink('nowhere', tmp_path / 'many/z')
    with pytest.raises(ValueError, match='many/z is no file'):
        prepare_data.find_files([str(tmp_path / 'many')])
    os.link(write(tmp_path / 'in/val.txt', 'v v'), tmp_path / 'V')  # held out under any name
    write(tmp_path / 'in/copy.txt', 'v v')
    _, meta = prepare(Settings(input=[tmp_path / 'in'], out_dir=str(tmp_path / 'out'),
                               val=[str(tmp_path / 'V')], tokenizer='byte'))
    assert meta['counts']['train']['documents'] == 3 and meta['counts']['val']['documents'] == 1
    assert '2 <|endoftext|> do not stand alone' in capsys.readouterr().out
    both = [str(tmp_path / 'val' / 'all.txt')]  # one file for both splits is taken as it is given
    write(tmp_path / 'val/all.txt', 'v v')
    _, meta = prepare(Settings(input=both, val=both, tokenizer='byte', out_dir=str(tmp_path / 'n')))
    assert meta['counts']['train'] == meta['counts']['val']
    assert meta['sha256'] == hashlib.sha256(b'v v' * 2).hexdigest()  # of both splits
    texts, end = [[]], BYTE.end_id
    for i in ids_of(tmp_path / 'out', 'train'):
        texts.append([]) if i == end else texts[-1].append(i)
    texts = [BYTE.decode(t) for t in texts]
    assert texts == ['one\n', 'two\n\nstill two<|endoftext|>\n', 'three\n<|endoftext|>\n', '']

@settings(max_examples=20)
@given(st.text('ab c\n', min_size=20, max_size=200), st.floats(0.05, 0.95))
def test_the_split_is_one_cut(tmp_path_factory, text, fraction):
    """The last val_fraction of the characters, in their order; the cut itself ends no document."""
    folder = tmp_path_factory.mktemp('split')
    path = write(folder / 'a.txt', text)
    cut = int(len(text) * (1 - fraction))
    try:
        prepare(Settings(input=[path], tokenizer='byte', val_fraction=fraction,
                         out_dir=f'{folder}/out'))
    except ValueError as e:
        assert 'too short' in str(e) and min(cut, len(text) - cut) < 3
        return
    assert ids_of(folder / 'out', 'train') == BYTE.encode(text[:cut]).tolist()
    assert ids_of(folder / 'out', 'val') == [*BYTE.encode(text[cut:]).tolist(), BYTE.end_id]

def test_reading_in_pieces_changes_nothing(tmp_path, bpe):
    """A file of more than a piece, and a million blanks, give the ids of the text itself."""
    line = 'Some words, 床前明月光. '
    text = (line * 50 + '\n') * 4000 + '\n' * 1_200_000 + line * 100
    assert len(text) > prepare_data.PIECE
    write(tmp_path / 'a.txt', text)
    write(tmp_path / 'tok/tokenizer.json', json.dumps(bpe.to_dict()))
    _, meta = prepare(Settings(input=[str(tmp_path / 'a.txt')], out_dir=str(tmp_path / 'out'),
                               tokenizer=str(tmp_path / 'tok'), val_fraction=0.001))
    ids = ids_of(tmp_path / 'out', 'train') + ids_of(tmp_path / 'out', 'val')
    assert bpe.decode(ids[:-1]) == text and ids[-1] == bpe.end_id
    assert sum(c['characters'] for c in meta['counts'].values()) == len(text)

def test_bpe_learns_from_the_training_part_alone(tmp_path):
    """Pairs that only validation has must not become tokens."""
    text = write(tmp_path / 'a.txt', 'ab cd ' * 90 + 'zq zq ' * 10)
    path, val = (write(tmp_path / f'{x}.tsv', f'{x} {x} {x}\t{x}\n' * 9) for x in ('ab', 'zq'))
    prepare(Settings(input=[path], val=[val], task='seq2seq', tokenizer='char',
                     out_dir=str(tmp_path / 'out')))
    for files in (dict(input=[text]), dict(input=[path], val=[val], task='seq2seq')):
        prepare(Settings(**files, vocab_size=380, out_dir=str(tmp_path / 'out')))
        tokenizer = prepare_data.load_tokenizer(tmp_path / 'out')
        assert len(tokenizer.encode(' ab')) == 1 and len(tokenizer.encode(' zq')) == 3

def test_ids_fit_their_file(tmp_path):
    """uint16 up to 65,536 tokens, uint32 beyond: no id wraps around."""
    characters = [chr(c) for c in range(0x4E00, 0x4E00 + 70_000) if not 0xD800 <= c < 0xE000]
    for n, dtype in ((65_536 - 105, 'uint16'), (65_537 - 105, 'uint32')):
        text = ''.join(characters[:n])
        path = write(tmp_path / f'{n}.txt', text)
        _, meta = prepare(Settings(input=[path], tokenizer='char', out_dir=str(tmp_path / dtype)))
        assert meta['dtype'] == dtype and meta['vocab_size'] == n + 105
        ids = ids_of(tmp_path / dtype, 'train') + ids_of(tmp_path / dtype, 'val')
        assert ids == [*range(n), n]

def test_meta_tells_the_truth(tmp_path):
    path = write(tmp_path / 'a.txt', '床前明月光\n' * 20)
    _, meta = prepare(Settings(input=[path], tokenizer='char', out_dir=str(tmp_path / 'out')))
    assert meta == json.loads((tmp_path / 'out/meta.json').read_text(encoding='utf-8'))
    assert meta['sha256'] == hashlib.sha256((tmp_path / 'a.txt').read_bytes()).hexdigest()
    for split, c in meta['counts'].items():
        assert c['tokens'] == len(ids_of(tmp_path / 'out', split))
        assert c['bytes'] == c['characters'] * 3 - 2 * round(c['characters'] / 6)
    assert (meta['task'], meta['labels'], meta['source']) == ('lm', [], [path])

def test_an_old_data_folder_is_replaced_and_nothing_else(tmp_path, monkeypatch):
    """A slip in --out_dir must not cost a thesis; an error leaves the old folder."""
    path, out = write(tmp_path / 'a.txt', 'some words ' * 30), tmp_path / 'out'
    make = lambda **kw: prepare(Settings(input=[path], tokenizer='byte', out_dir=f'{out}', **kw))
    make()
    before = contents(out)
    write(out / 'left.bin', 'over')
    make()
    assert contents(out) == before, 'preparing again gives the same bytes, and nothing old remains'
    with pytest.raises(ValueError, match='val split'):
        make(val=[write(tmp_path / 'in/empty.txt', '')])
    assert contents(out) == before
    assert sorted(os.listdir(tmp_path)) == ['a.txt', 'in', 'out']
    broken = lambda a, b: os.rename(a, b) if a.name != 'new' else 1 / 0
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(type(out), 'rename', broken)
        make()
    assert contents(out) == before
    (tmp_path / 'link').symlink_to(out)
    prepare(Settings(input=[path], tokenizer='char', out_dir=str(tmp_path / 'link')))
    assert (tmp_path / 'link').is_symlink() and contents(out) != before
    with pytest.raises(NotADirectoryError):
        prepare(Settings(input=[path], out_dir=path))
    for name, inputs in (('thesis/train.jsonl', [path]),
                         ('out/train.jsonl', [str(out / 'train.jsonl')]), ('out/notes.md', [path])):
        write(kept := tmp_path / name, '{"text": "years"}\n' * 30)
        with pytest.raises(ValueError, match='choose another name'):
            prepare(Settings(input=inputs, tokenizer='byte', out_dir=str(kept.parent)))
        assert kept.read_text().startswith('{"text": "years"}')

def test_memory_does_not_grow_with_the_text(tmp_path):
    code = ("import resource, runpy, sys; sys.argv = sys.argv[1:];"
        "sys.path.insert(0, sys.argv.pop()); runpy.run_path(sys.argv[0], run_name='__main__');"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peaks = []
    for n in (100_000, 800_000):
        write(tmp_path / f'{n}.txt', 'Some words of a line, and more of them.\n' * n)
        words = [str(ROOT / 'prepare_data.py'), '--input', f'{n}.txt', '--tokenizer=byte']
        done = subprocess.run([sys.executable, '-c', code, *words, str(ROOT)], cwd=tmp_path,
                              capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.4 * peaks[0], peaks

# -----------------------------------------------------------------------------
# Examples of the tasks

@settings(max_examples=50)
@given(st.lists(MIXED, min_size=1, max_size=2), st.integers(8, 60))
@example(['a' * 50, '世界'], 20)
@example(['[SEP]' * 9, '[CLS]' * 9], 8)  # special tokens in a text are text
def test_a_text_too_long_loses_the_end_of_the_longer(bpe, texts, block_size):
    """Never more than block_size tokens, no fewer than fit; the last is [SEP]."""
    row = dict(zip(('text', 'text_b'), texts)) | {'label': '好'}
    for tokenizer in (BYTE, bpe):
        [made] = TASKS['classify'].examples(tokenizer, row, ['坏', '好'], block_size)
        ids, whole = made['ids'], [tokenizer.encode(text).tolist() for text in texts]
        seps = [i for i, token in enumerate(ids) if token == tokenizer.id('[SEP]')]
        assert len(ids) == min(block_size, sum(map(len, whole)) + 1 + len(texts))
        assert len(seps) == len(texts) and seps[-1] == len(ids) - 1
        kept = [ids[a + 1 : b] for a, b in zip([0, *seps], seps)]
        longest = max(map(len, kept))
        for part, text in zip(kept, whole):
            assert part == text[:len(part)] and (len(part) == len(text) or len(part) >= longest - 1)
        assert made['segments'] == [0] * (seps[0] + 1) + [1] * (len(ids) - seps[0] - 1)
        assert made['targets'] == 1 and made['meta'].items() >= row.items()

@settings(max_examples=40)
@given(st.lists(st.tuples(WORD, st.sampled_from(['O', 'B-地', 'I-地'])), min_size=1, max_size=12),
    st.integers(8, 40))
@example([('😀' * 9, 'B-地'), ('a', 'I-地'), ('世界' * 9, 'O')], 8)
def test_the_first_piece_carries_the_tag_and_no_token_is_lost(bpe, row, block_size):
    """Parts of a long text hold all tokens once, in order; no other piece has a target."""
    tokens, tags = map(list, zip(*row))
    labels = ['O', 'B-地', 'I-地']
    for tokenizer in (CHAR({*''.join(tokens)} | {' '}), CHAR({*''.join(tokens)}), BYTE, bpe):
        made = TASKS['tag'].examples(
            tokenizer, {'tokens': tokens, 'tags': tags}, labels, block_size)
        assert [token for part in made for token in part['meta']['tokens']] == tokens
        assert [tag for part in made for tag in part['meta']['tags']] == tags
        for part in made:
            assert len(part['ids']) == len(part['targets']) <= block_size
            has = {i: t for i, t in enumerate(part['targets']) if t != IGNORE_INDEX}
            assert has == dict(zip(part['meta']['first'], map(labels.index, part['meta']['tags'])))
            assert len(set(part['meta']['first'])) == len(part['meta']['tokens']), 'a shared place'

def test_a_tagged_text_is_cut_between_tokens_where_it_no_longer_fits():
    """A worked example: `Jo` and `世` fill the first part, `ab` makes the second."""
    cls, sep, dot = BYTE.id('[CLS]'), BYTE.id('[SEP]'), IGNORE_INDEX
    row = {'tokens': ['Jo', '世', 'ab'], 'tags': ['B-人', 'O', 'I-人']}
    one, two = TASKS['tag'].examples(BYTE, row, ['O', 'B-人', 'I-人'], 9)
    assert one['ids'] == [cls, *'Jo 世 '.encode(), sep]
    assert one['targets'] == [dot, 1, dot, dot, 0, dot, dot, dot, dot] and one['meta']['first'] == [
        1, 4]
    assert two['ids'] == [cls, *b'ab', sep] and two['targets'] == [dot, 2, dot, dot]

def pointed_at(made):
    """The place in the whole context that the targets of a qa example mean; None for [CLS]."""
    meta, (low, high) = made['meta'], made['targets']
    if (low, high) == (0, 0):
        return None
    begin, end = meta['offsets'][low - meta['first']][0], meta['offsets'][high - meta['first']][1]
    return meta['start'] + begin, meta['start'] + end

@settings(max_examples=80)
@given(st.integers(0, 2), MIXED.filter(str.strip), st.integers(0, 59), st.integers(1, 12),
    st.integers(8, 40))
@example(2, '床前明月光，疑是地上霜。' * 9, 2, 2, 24)  # inside of a token
@example(2, 'It was the best of times, it was the worst. ' * 9, 3, 1, 16)
@example(0, '床前明月光，疑是地上霜。' * 9, 50, 12, 24)
def test_windows_cover_every_answer_and_every_character(
    bpe, which, context, start, size, block_size):
    """Every answer that fits stands whole in a window, whose targets give it back."""
    start %= len(context)
    answer, question = context[start : start + size], '谁 is it?'
    if not answer.strip():
        return
    tokenizer = (CHAR(set(context + question)), BYTE, bpe)[which]
    row = {'id': 'q', 'question': question, 'context': context, 'answers': [(start, answer)]}
    try:
        windows = TASKS['qa'].examples(tokenizer, row, [], block_size)
    except ValueError as e:
        assert 'block_size' in str(e)
        return
    found, covered = 0, set()
    for made in windows:
        meta = made['meta']
        assert len(made['ids']) <= block_size and made['ids'][-1] == tokenizer.id('[SEP]')
        assert meta['context'] == context[meta['start'] :][: len(meta['context'])]
        covered |= {*range(meta['start'], meta['start'] + len(meta['context']))}
        if place := pointed_at(made):
            found += 1
            assert context[slice(*place)].strip() == answer.strip()
    assert found and covered == {*range(len(context))}

def test_every_gold_answer_of_xquad_comes_back_from_its_prepared_example(tmp_path, shared):
    """1,190 questions, each answered in at least one window; no context is in both splits."""
    path = shared / 'data/xquad.en.json'
    prepare(Settings(input=[str(path)], task='qa', vocab_size=1000, block_size=128,
        out_dir=str(tmp_path / 'out')))
    gold = {q['id']: (p['context'], q['answers'][0]['text']) for article in json.loads(
            path.read_bytes())['data'] for p in article['paragraphs'] for q in p['qas']}
    found, contexts = set(), collections.defaultdict(set)
    for split in ('train', 'val'):
        for made in map(json.loads, (tmp_path / f'out/{split}.jsonl').read_bytes().splitlines()):
            context, answer = gold[made['meta']['id']]
            contexts[split].add(context)
            if place := pointed_at(made):
                found.add(made['meta']['id'])
                assert context[slice(*place)].strip() == answer.strip()
    assert len(found) == len(gold) == 1190 and not contexts['train'] & contexts['val']

@settings(max_examples=40)
@given(MIXED, MIXED, st.integers(8, 60))
def test_a_target_is_one_token_ahead_and_has_its_end(source, target, block_size):
    try:
        [made] = TASKS['seq2seq'].examples(
            BYTE, {'source': source, 'target': target}, [], block_size)
    except ValueError as e:
        assert 'block_size' in str(e)
        assert max(len(source.encode()), len(target.encode())) >= block_size
        return
    assert made['ids'] == [*source.encode(), BYTE.end_id]
    assert made['targets'] == [*target.encode(), BYTE.end_id]
    assert made['decoder_ids'] == [BYTE.start_id, *target.encode()]

def test_a_question_is_cut_into_tokens_as_its_context_is():
    """Chinese, too, where a token may hold several characters or signs, and none in a context."""
    tokenizer = prepare_data.bpe_tokenizer(['床前明月光》。' * 99], 400)
    [made] = TASKS['qa'].examples(tokenizer, {'question': '光》。', 'context': '光》。'}, [], 40)
    question, context = ' '.join(map(str, made['ids'][1:-1])).split(f" {tokenizer.id('[SEP]')} ")
    assert question == context and len(tokenizer.encode('光》。')) < len(question.split())
    [made] = TASKS['qa'].examples(BYTE, {'question': 'x' * 50, 'context': 'abc'}, [], 16)
    assert bytes(made['ids'][1:9]) == b'x' * 8 and len(made['ids']) == 3 + 8 + 3

def test_bpe_learns_what_questions_can_use_and_says_which_answers_are_too_long(tmp_path, capsys):
    context = '床前明月光，疑是地上霜。' * 4
    row = {'id': 'q', 'question': ' 谁？', 'answers': [
        {'answer_start': 0, 'text': context[:31]}, {'answer_start': -1, 'text': 'only to score'}]}
    whole = {'data': [{'paragraphs': [{'context': context, 'qas': [row]}]}]}
    path = write(tmp_path / 'a.json', json.dumps(whole))
    prepare(Settings(input=[path], val=[path], task='qa', out_dir=str(tmp_path / 'out')))
    assert 'train: 1 examples have an answer of over 30 tokens' in capsys.readouterr().out
    tokens = prepare_data.load_tokenizer(tmp_path / 'out').ranks
    assert '床'.encode() in tokens and '明月'.encode() not in tokens
    assert rows_of('qa', path)[0]['question'] == '谁？'
    row['is_impossible'] = True
    assert rows_of('qa', write(tmp_path / 'b.json', json.dumps(whole)))[0]['answers'] == []
    made = TASKS['qa'].examples(BYTE, {'question': '?', 'context': 'x' * 95}, [], 24)
    assert [e['meta']['start'] for e in made] == [*range(0, 75, 10), 75]  # half of 20 tokens

def test_rows_to_be_answered_have_no_targets(bpe):
    """What a user writes has no label, tags or answers: the same examples, no targets."""
    rows = {'classify': ({'text': '床前明月光'}, {'label': 'b'}),
        'tag': ({'tokens': ['明', '月']}, {'tags': ['O', 'O']}),
        'qa': ({'question': '谁？', 'context': 'It best times ' * 19},
               {'id': 'q', 'answers': [(3, 'best'), (8, 'times')]})}
    for task, (asked, gold) in rows.items():
        plain = TASKS[task].examples(bpe, asked, ['O', 'b'], 40)
        right = TASKS[task].examples(bpe, asked | gold, ['O', 'b'], 40)
        assert ['targets' in a for a in plain + right] == [False] * len(plain) + [True] * len(right)
        assert [made['ids'] for made in plain] == [made['ids'] for made in right], task
    assert right[0]['targets'] == [9, 9]  # ` best`, the first answer, whose token is not cut

# -----------------------------------------------------------------------------
# Rows as people have them

def rows_of(task, path):
    return [{k: v for k, v in row.items() if k != 'where'} for row in TASKS[task].read(str(path))]

FIELD = st.text(st.characters(codec='utf-8', exclude_characters='\t\n\r\ufeff'), min_size=1,
                max_size=20).filter(str.strip)

@settings(max_examples=40)
@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=6),
    st.sampled_from(['\n', '\r\n', '\r']), st.sampled_from(['', '\ufeff']),
    st.sampled_from(['', 'end', 'two']), st.booleans())
def test_pairs_come_back_whatever_is_in_them(tmp_path_factory, pairs, end, mark, last, as_json):
    """TSV with any line ends, a byte order mark, an empty last line; or JSON lines."""
    if any(text.lower() in prepare_data.HEADERS for text in pairs[0]):
        return
    folder = tmp_path_factory.mktemp('pairs')
    if as_json:
        lines, name = [json.dumps({'source': a, 'target': b}) for a, b in pairs], 'a.jsonl'
    else:
        lines, name = [f'{a}\t{b}' for a, b in pairs], 'a.tsv'
    write(folder / name, mark + end.join(lines) + end * ['', 'end', 'two'].index(last))
    rows = rows_of('seq2seq', folder / name)
    assert [(row['source'], row['target']) for row in rows] == pairs
    made = prepare_data.encode_rows(BYTE, 'seq2seq', rows, [], 999)
    assert [bytes(e['ids'][:-1]).decode() for e in made] == [a.strip() for a, _ in pairs]

def test_bpe_learns_from_all_over_a_large_text(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, 'BPE_SAMPLE', 100)
    write(tmp_path / 'a.jsonl', '{"text": "aaaa"}\n' * 90 + '{"text": "zzzz"}\n' * 90)
    prepare(Settings(input=[str(tmp_path / 'a.jsonl')], out_dir=str(tmp_path / 'out')))
    ranks = prepare_data.load_tokenizer(tmp_path / 'out').ranks
    assert {b'aaaa', b'zzzz'} <= ranks.keys()
    monkeypatch.setattr(prepare_data, 'BPE_SAMPLE', 400)  # of 900: every second row of a language
    write(tmp_path / 'a.jsonl', '{"text": "aaaa"}\n{"text": "zzzz"}\n' * 90)
    prepare(Settings(input=[str(tmp_path / 'a.jsonl')], out_dir=str(tmp_path / 'out')))
    ranks = prepare_data.load_tokenizer(tmp_path / 'out').ranks
    assert {b'aaaa', b'zzzz'} <= ranks.keys()

def test_labels_may_have_a_second_text_and_be_numbers(tmp_path, capsys):
    """label<TAB>text[<TAB>text]; in JSON lines a number is taken as its text (U6)."""
    write(tmp_path / 'a.tsv', '{"a": 1}\t A text \n\n\ufeffbad\ta\tb\n')
    assert rows_of('classify', tmp_path / 'a.tsv') == [
        {'label': '{"a": 1}', 'text': 'A text'}, {'label': 'bad', 'text': 'a', 'text_b': 'b'}]
    same = dict(input=[str(tmp_path / 'a.tsv')], val=[str(tmp_path / 'a.tsv')], tokenizer='byte')
    prepare(Settings(**same, task='classify', block_size=8, out_dir=str(tmp_path / 'out')))
    out = capsys.readouterr().out
    assert 'train: 1 examples fill --block_size 8: their texts' in out
    assert '2 different rows are both in train and in val' in out
    prepare(Settings(**same, out_dir=str(tmp_path / 'text')))
    assert 'a.tsv is read as plain text: labelled rows need --task\n' in capsys.readouterr().out
    assert prepare_data.texts_of({'label': 'bad', 'text': 'a', 'text_b': 'b'})[:2] == ['a', 'b']
    write(tmp_path / 'a.jsonl', '{"label": true, "text": "x", "text_b": null, "at": 2}\n'
          '{"label": " e\u0301\\n c", "text": "\\"\\"\\"y\\"", "text_b": "z"}')  # quotes as text
    assert rows_of('classify', tmp_path / 'a.jsonl') == [  # null is nothing
        {'label': 'true', 'text': 'x'}, {'label': 'é c', 'text': '"""y"', 'text_b': 'z'}]
    assert capsys.readouterr().err == f"{tmp_path / 'a.jsonl'}: not read: at\n"

def test_tagged_files_of_all_kinds_are_read(tmp_path, capsys):
    """Four columns, -DOCSTART-, words of CJK; U+00A0 is part of a token, no border (F17)."""
    write(tmp_path / 'a.conll', '-DOCSTART- -X- O O\n\n1 CD O O\n2 CD O O\n\nEU NNP I-NP B-ORG\n'
          '10\u00a0000 CD I-NP O\n\n \t\n東京Bonn NNP I-NP B-LOC')
    assert rows_of('tag', tmp_path / 'a.conll') == [
        {'tokens': ['1', '2'], 'tags': ['O', 'O']},  # a text, no column that counts
        {'tokens': ['EU', '10\u00a0000'], 'tags': ['B-ORG', 'O']},
        {'tokens': ['東', '京', 'Bonn'], 'tags': ['B-LOC', 'I-LOC', 'I-LOC']}]
    assert len(rows_of('tag', write(tmp_path / 'b.conll', 'EU\tO\n\n' * 12))) == 12
    assert prepare_data.tag_names({'B-x', 'O', 'I-a'}) == ['O', 'B-a', 'I-a', 'B-x', 'I-x']
    assert rows_of('tag', write(tmp_path / 'c', 'EU \tO\n')) == [{'tokens': ['EU'], 'tags': ['O']}]
    assert 'b.conll: each of 12 texts has one token' in capsys.readouterr().err
    rows = rows_of('tag', write(tmp_path / 'd', 'a\tO\n\ufeff\tO\n\ufeffb\tO\n\ufeff\nc O\n'))
    assert [row['tokens'] for row in rows] == [['a', '\ufeff', 'b'], ['c']]

ANSWER = '"id": "q1", "question": "谁", "answers": [{"answer_start": 1, "text": "月"}]'
QUESTION = ('{"data": [{"paragraphs": [\n{"context": "明月", "qas": [\n{' + ANSWER + '}]},\n'
            '{"context": "x", "qas": [{"id": "q2", "question": "x?", "answers": []}]}]}]}')
LABELS = '好\t一\n坏\t二\n'
MALFORMED = {  # name: (task, {file: text}, further flags, what the line must say)
    'a missing tab': ('classify', {'a.tsv': '好\t一\n\n没有\n'}, [], 'a.tsv, line 3'),
    'four columns': ('classify', {'a.tsv': '好\t一\r\n好\t一\t二\t三\r\n'}, [], 'a.tsv, line 2'),
    'an empty text': ('classify', {'a.tsv': '好\t一\n好\t\u3000\n'}, [], 'text[<TAB>text_b]'),
    'a list': ('classify', {'a.json': '[{"label": "1", "text": "x"}]'}, [], 'as JSON lines'),
    'JSON over lines': ('lm', {'a.json': '{\n "text": "x"\n}' * 99}, [], 'as JSON lines'),
    'a JSON row too few': ('classify', {'A.JSONL': '{"label": "a"}'}, [], 'A.JSONL, line 1'),
    'a header': (
        'classify', {'a.tsv': 'label \t"Title"\n' + LABELS * 9}, [], 'line 1 looks like a header'),
    'an unlisted header': (
        'classify', dict.fromkeys(('a.tsv', 'b.tsv'), 'polarity\ttweet\n' + LABELS * 9),
        ['--input', 'b.tsv'], "a.tsv, line 1: the label 'polarity' is nowhere else"),
    'quoted as in CSV': ('classify', {'a.tsv': LABELS + '好\t"a ""b"" c"\n'}, [], 'line 3: "a ""b'),
    'a Chinese header': ('seq2seq', {'a.tsv': '中文\t英文\n'}, [], 'line 1 looks like a header'),
    'a quoted label': ('classify', {'a.tsv': '"好"\t"a"\n'}, [], 'line 1: "好" is quoted'),
    'quoted on the left': ('seq2seq', {'a.tsv': '"a ""b"" c"\t"d"\n'}, [], 'line 1: "a ""b'),
    'counted tokens': ('tag', {'a.conll': '1 EU B-组织\n2 说 O\n'}, [], 'first column counts'),
    'as in WikiANN': ('tag', {'a.conll': 'zh:京 B-地\nzh:说 O\n'}, [], 'all tokens begin with zh:'),
    'counted texts': ('tag', {'a.conll': 'S 1\tEU\tO\nS 1\t说\tO\n'}, [], 'first column counts'),
    'columns swapped': (
        'classify', {'a.tsv': ''.join(f'film {i} {i:999}\t1\n' for i in range(20))}, [],
        'first column'),
    'the label last': ('classify', {'a.tsv': ''.join(
        f'film {i // 3}\t问 {i}\t{i % 2}\n' for i in range(36))}, [], 'first column'),
    'measurements': ('classify', {'a.tsv': ''.join(
        f'{i % 20 / 5}\t一 {i}\n' for i in range(60))}, [], 'no measurements'),
    'some measurements are whole': ('classify', {'a.tsv': ''.join(
        f'{i % 20 / 5:g}\t一 {i}\n' for i in range(60))}, [], 'no measurements'),
    'an unknown label': (
        'classify', {'a.tsv': LABELS, 'v.tsv': '妙\t二\n'}, ['--val', 'v.tsv'], "'妙' is unknown"),
    'one label': ('classify', {'a.tsv': '好\t一\n' * 9}, [], 'two or more'),
    'not UTF-8': ('classify', {'a.tsv': '好\t一\n'.encode() + b'\xff'}, [], 'the byte at offset 8'),
    'no JSON': ('classify', {'a.jsonl': '{"label":"b","text":"c"}\nb\tc\n'}, [], 'a.jsonl, line 2'),
    'no number': ('classify', {'a.jsonl': '{"label": NaN, "text": "b"}'}, [], 'a.jsonl, line 1'),
    'half a letter': ('classify', {'a.jsonl': '{"label": "好", "text": "\\ud83d"}'}, [], 'line 1'),
    'a pointer': ('lm', {'a.txt': 'version https://git-lfs...'}, [], 'a.txt is a git-LFS pointer'),
    'no rows': ('classify', {'a.tsv': '\n\n'}, [], '0 rows'),
    'no validation': ('classify', {'a.tsv': LABELS, 'w': '\n'}, ['--val', 'w'], 'w: 2 rows'),
    'no tag': ('tag', {'a.conll': 'EU\tB-组织\n说\n'}, [], 'a.conll, line 2'),
    'another scheme': ('tag', {'a.conll': 'EU\tO\n说\tE-组织\n'}, [], 'E- are I- here'),
    'a column too few': ('tag', {'a.conll': 'EU NNP B-组织\n说 O\n'}, [], 'a.conll, line 2'),
    'not SQuAD': ('qa', {'a.json': '{"rows": []}'}, [], 'a.json'),
    'an answer elsewhere': ('qa', {'a.json': QUESTION.replace(': 1,', ': 0,')}, [], 'line 3'),
    'no answers': ('qa', {'a.json': QUESTION.replace(', "answers": []', '')}, [], 'q2'),
    'a missing target': ('seq2seq', {'a.tsv': 'one\t1\ntwo\n' * 9}, [], 'a.tsv, line 2'),
    'an empty line inside': ('seq2seq', {'a.tsv': 'one\t1\n\ntwo\t2\n'}, [], 'a.tsv, line 2'),
    'a target too long': ('seq2seq', {'a.tsv': ('one\t' + '1' * 99 + '\n') * 9},
                          ['--tokenizer', 'byte'], '(one of 8 such rows)'), }

@pytest.mark.parametrize('name', MALFORMED)
def test_a_malformed_row_is_named_with_its_file_and_line(tmp_path, monkeypatch, capsys, name):
    """One line, status 2, and nothing half-written is left."""
    task, files, flags, says = MALFORMED[name]
    for path, text in files.items():
        write(tmp_path / path, text)
    monkeypatch.chdir(tmp_path)
    argv = ['--input', next(iter(files)), '--task', task, '--vocab_size=370', '--out_dir', 'out']
    monkeypatch.setattr(sys, 'argv', ['prepare_data.py', *argv, *flags])
    with pytest.raises(SystemExit) as end:
        prepare_data.run(prepare_data.main)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, '') and err.count('\n') == 1, err
    assert says in err and len(err) < 999 and sorted(os.listdir()) == sorted(files), err

@settings(max_examples=25)
@given(st.lists(st.integers(0, 5), min_size=4, max_size=40), st.floats(0.1, 0.9))
def test_rows_are_shuffled_and_contexts_stay_together(contexts, fraction):
    """Nothing is lost or doubled, the shuffle is fixed, no context is in both splits."""
    rows = [{'n': i, 'context': c} for i, c in enumerate(contexts)]
    train, val = prepare_data.split_rows(rows, fraction)
    assert sorted(row['n'] for row in train + val) == list(range(len(rows)))
    assert not {row['context'] for row in train} & {row['context'] for row in val}
    assert (train, val) == tuple(prepare_data.split_rows(rows, fraction))
    # one context with most of the rows does not leave the others to validation as well
    train, val = prepare_data.split_rows([{'context': max(i, 60)} for i in range(100)], 0.3)
    assert {len(train), len(val)} == {39, 61}
    train, val = prepare_data.split_rows([{'n': i} for i in range(100)], fraction)
    assert len(val) == 100 - round(100 * (1 - fraction))
    assert [*train, *val] != sorted([*train, *val], key=lambda row: row['n'])

# -----------------------------------------------------------------------------
# Data sets

@pytest.fixture
def served(tmp_path, monkeypatch):
    """A mirror in a folder and on loopback: (address, folder)."""
    monkeypatch.setenv('no_proxy', '*')
    folder = tmp_path / 'mirror'
    folder.mkdir()
    handler = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=str(folder))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}', folder
    server.shutdown()

def test_downloads_are_checked_and_explained(tmp_path, shared, served):
    """A mirror is a folder or a server; other bytes are refused by their sha256."""
    address, folder = served
    path = f"{prepare_data.DOWNLOADS['shakespeare'][0]}/input.txt"
    data = (shared / 'data/tinyshakespeare.txt').read_bytes()
    write(folder / path, data)
    for mirror in (address, str(folder) + '/'):
        _, meta = prepare(Settings(
            dataset='shakespeare', tokenizer='char', mirror=mirror, out_dir=str(tmp_path / 'out')))
        assert (meta['source'], meta['vocab_size']) == ('shakespeare', 65 + 105)
    write(folder / path, data[:-1])
    with pytest.raises(ValueError, match='sha256'):
        prepare(Settings(dataset='shakespeare', mirror=address, out_dir=str(tmp_path / 'other')))
    (folder / path).unlink()
    for mirror in (address, str(folder), 'http://127.0.0.1:1'):
        with pytest.raises(ValueError, match='--mirror'):
            prepare(Settings(dataset='shakespeare', mirror=mirror, out_dir=str(tmp_path / 'other')))

def test_downloaded_reviews_and_captions_have_their_labels_and_languages():
    reviews = [b'good\n' * 9, b'caf\xe9 bad\n' * 11]
    captions = [prepare_data.gzip.compress(x) for x in (b'a  b\nc\n', b'A\nC\n', b'v', b'V')]
    train, val = map(str.splitlines, prepare_data.rotten_tomatoes(*reviews))
    assert {*train, *val} == {'positive\tgood', 'negative\tcafé bad'}
    assert (len(train), len(val)) == (16, 2)
    assert prepare_data.multi30k(*captions) == ['a b\tA\nc\tC\n', 'v\tV\n']

def test_the_offline_data_sets_are_large_clean_and_the_same_in_every_process(tmp_path):
    """Made twice in processes of their own; nothing of Python's library is imported."""
    code = ("import sys, hashlib; sys.path.insert(0, sys.argv[1]); import prepare_data as p;"
        "n = set(sys.modules); names = 'pydoc', 'pytopics', 'pytokens', 'numbers', 'recall';"
        "print(*(hashlib.sha256(repr(getattr(p, k)()).encode()).hexdigest() for k in names));"
        "assert not {'tkinter', 'turtle', 'torch'} & (set(sys.modules) - n)")
    run = lambda seed: subprocess.run([sys.executable, '-c', code, str(ROOT)], capture_output=True,
        text=True, check=True, env={**os.environ, 'PYTHONHASHSEED': seed})
    assert run('1').stdout == run('2').stdout
    topics = [line.split('\t') for line in prepare_data.pytopics()[0].splitlines()]
    assert len({label for label, _ in topics}) == 12 and len(topics) > 2000
    assert prepare_data.pydoc()[0].count('<|endoftext|>\n') > 400
    kinds = {line.split('\t')[1] for line in prepare_data.pytokens()[0].splitlines() if line}
    assert {'O', 'B-keyword', 'B-name', 'B-number', 'B-string', 'I-string', 'B-comment'} <= kinds
    seen, titles = set(), [title for title, _ in prepare_data.docstrings(prepare_data.ast.parse(
        'class A:\n class B:\n  def f(x=1): pass'), 'm')]
    assert titles == ['m', 'class A', 'class A.B', 'A.B.f(x=1)']
    for document in prepare_data.recall()[1].split('<|endoftext|>\n')[:50]:
        pairs = [document.strip()[i : i + 2] for i in range(0, 60, 2)]
        assert len(set(pairs)) == len({pair[0] for pair in pairs}) <= 8, document
        seen |= {*pairs}
    assert len(seen) > 100, 'a letter has its digit in each document'

WORDS_OF = dict(zip('one two three four five six seven eight nine ten eleven twelve thirteen '
    'fourteen fifteen sixteen seventeen eighteen nineteen'.split(), range(1, 20)))
WORDS_OF |= dict(zip('twenty thirty forty fifty sixty seventy eighty ninety'.split(),
                     range(20, 100, 10)))

def test_every_row_of_numbers_is_right():
    rows = [line.split('\t') for line in prepare_data.numbers()[0].splitlines()]
    assert len({target for _, target in rows}) == 20_000
    sizes = collections.Counter(len(target) for _, target in rows)
    assert min(sizes[digits] for digits in (4, 5, 6)) > 5000, sizes
    for words, digits in rows:
        total, part = 0, 0
        for word in words.replace('-', ' ').split():
            if word == 'thousand':
                total, part = total + 1000 * part, 0
            else:
                part = 100 * part if word == 'hundred' else part + WORDS_OF[word]
        assert total + part == int(digits), words

# -----------------------------------------------------------------------------
# Flags and the command line

@dataclasses.dataclass
class Flags:
    n: int = flag(3, 'a number', low=1, high=9)
    x: float = flag(0.5, 'a share', above=0, below=1)
    kind: str = flag('a', 'a choice', choices=('a', 'b'))
    compile: bool = flag(None, 'a switch')
    max_iters: int = flag(10, 'steps')
    paths: list = flag([], 'files')
    config: str = flag('', 'a file')

@pytest.mark.parametrize('argv, found', [
    ('--max_iters 7', {'max_iters': 7}), ('--max_iters=7', {'max_iters': 7}),
    ('--max-iters 7', {'max_iters': 7}), ('--compile', {'compile': True}),
    ('--no-compile', {'compile': False}), ('--compile=False', {'compile': False}),
    ('--paths a b --n 2', {'paths': ['a', 'b'], 'n': 2}), ('', {}),
    (['--kind', '--no-c is a-b'], {'kind': '--no-c is a-b'}),
    (['--kind=--a-b=c-d'], {'kind': '--a-b=c-d'})])
def test_a_flag_may_be_written_in_several_ways(argv, found):
    words = argv.split() if isinstance(argv, str) else argv
    assert read_flags(words, '', {'flags': Flags}) == found

def test_values_given_from_python_become_those_of_a_command_line():
    """A checkpoint holds them, and opens with plain data only."""
    flags = Flags(n=np.int64(2), x=np.float64(0.5), config=ROOT / 'a')
    check_flags(flags)
    assert [type(value) for value in (flags.n, flags.x, flags.config)] == [int, float, str]

@pytest.mark.parametrize('argv, says', [
    ('--max_itres 3', 'did you mean --max_iters?'), ('--n 2.5', '2.5'), ('--n x', '--n'),
    ('--n 0', 'at least 1'), ('--n 10', 'at most 9'), ('--x 0', 'above 0'), ('--x nan', 'finite'),
    ('--x inf', 'finite'), ('--kind c', 'choose one of a, b'), ('stray', 'stray'),
    ('--compile=7', '7')])
def test_a_wrong_flag_is_named_with_what_would_be_right(argv, says):
    read = lambda: check_flags(Flags(**read_flags(argv.split(), '', {'flags': Flags})))
    assert says in one_line(ValueError, read)

def test_a_config_file_counts_less_than_flags(tmp_path):
    values = {'n': 4, 'x': 0.25, 'compile': None, 'paths': ['a', 'b']}
    path = write(tmp_path / 'c.toml', prepare_data.write_config(values))
    assert read_flags(['--config', path, '--n', '5'], '', {'flags': Flags}) == {
        'config': path, 'n': 5, 'x': 0.25, 'paths': ['a', 'b']}
    for bad in ('n = ', 'nn = 3', 'n = "x"'):
        write(tmp_path / 'c.toml', bad)
        with pytest.raises(ValueError, match=r'c\.toml'):
            read_flags(['--config', path], '', {'flags': Flags})

@pytest.mark.parametrize('files, flags, says', [
    ({}, ['--input', 'none.txt'], 'none.txt'), ({}, [], '--input'),
    ({'a.txt': ''}, ['--input', 'a.txt', '--tokenizer', 'char'], 'a.txt is empty'),
    ({'f/.hidden': 'x'}, ['--input', 'f'], 'nor a folder of files: give another'),
    ({'a.txt': '世界'.encode() + b'\xff'}, ['--input', 'a.txt'], 'offset 6'),
    ({'a.txt': 'Ann'.encode('utf-16-le') * 9}, ['--input', 'a.txt'], 'zero bytes'),
    ({'a.jsonl': '{"text": "ok"}\n{"body": "x"}'}, ['--input', 'a.jsonl'], 'a text for text'),
    ({'a.txt': 'abc' * 9}, ['--input', 'a.txt', '--tokenizer', 'unigram'], 'a Hugging Face folder'),
    ({'a.txt': 'abc' * 9}, ['--input', 'a.txt', '--val_fraction', '1'], 'below 1'),
    ({'a.txt': 'x'}, ['--input', 'a.txt', '--dataset', 'pydoc'], '--input'),
    ({}, ['--dataset', 'pidoc'], 'choose one of'),
    ({}, ['--dataset', 'pydoc', '--tokenizer', ''], '--tokenizer is empty'),
    ({}, ['--show', 'x', '--out_dir', 'none'], 'none'),
    ({}, ['--dataset', 'pydoc', '--task', 'tag'], 'pydoc is for lm')])
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, files, flags, says):
    """Exit status 2, no traceback (but for python -X dev), nothing written."""
    for path, text in files.items():
        write(tmp_path / path, text)
    before, dev = contents(tmp_path), os.environ | {'PYTHONDEVMODE': '1'}
    assert 'Traceback' in command('prepare_data.py', *flags, cwd=tmp_path, status=1, env=dev).stderr
    line = refused('prepare_data.py', *flags, cwd=tmp_path)
    assert line.startswith('prepare_data.py: error: ') and says in line, line
    assert contents(tmp_path) == before

@pytest.mark.parametrize('name, quoted', [('诗', '诗'), ('诗 集', '"诗 集"')])
def test_a_good_run_says_what_it_made_and_what_comes_next(tmp_path, name, quoted):
    """Counts, the next command, and silence on standard error, also with a name in Chinese."""
    line = '床前明月光，疑是地上霜。\n'
    write(tmp_path / f'{name}.txt', line * 30)
    done = command('prepare_data.py', '--input', f'{name}.txt', '--val-fraction=0.2',
                   '--tokenizer=char', cwd=tmp_path, env=os.environ | {'PYTHONIOENCODING': 'ascii'})
    assert done.stderr == '' and done.stdout.splitlines() == [
        'train: 312 tokens, 312 characters, 1 document',
        'val:   79 tokens, 78 characters, 1 document',
        f"data/{name}: char tokenizer, vocabulary of {len(set(line)) + 105}. "
        f'Next: python train.py --dataset {quoted}']
    shown = command('prepare_data.py', '--show', '明月', '--tokenizer', 'byte', cwd=tmp_path).stdout
    assert shown.startswith('6 tokens: ‹E6› 230')

def test_the_folder_has_the_name_of_its_source(tmp_path, monkeypatch):
    """data/NAME below the working folder; a link gives its own name, not that of its target."""
    write(tmp_path / 'real.txt', 'some words ' * 30)
    (tmp_path / 'link.txt').symlink_to('real.txt')
    monkeypatch.chdir(tmp_path)
    out_dir, _ = prepare(Settings(input=['link.txt'], tokenizer='byte'))
    assert out_dir == os.path.join('data', 'link') and (tmp_path / out_dir / 'meta.json').exists()

def test_ctrl_c_ends_with_its_status_and_no_traceback(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['x', 'y'])
    monkeypatch.setattr(sys, 'stdout', io.StringIO())  # as in a notebook
    with pytest.raises(SystemExit, match='130'):
        prepare_data.run(lambda argv: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match='129'):  # an exit, which cleans up
        prepare_data.run(lambda argv: signal.raise_signal(signal.SIGHUP))
    prepare_data.run(print)
    for stream in (None, types.SimpleNamespace(write=len, flush=list)):  # closed, or your own
        monkeypatch.setattr(sys, 'stderr', stream)
        prepare_data.progress('x')
        prepare_data.to_stderr('y')
    assert sys.stdout.getvalue() == "['y']\n"

def test_too_little_memory_is_one_line_with_a_remedy(monkeypatch, capsys):
    """torch says so by a RuntimeError; any other one is a bug, and keeps its traceback."""
    monkeypatch.setattr(sys, 'argv', ['x'])
    def fail(text):
        raise RuntimeError(text)
    for main in (lambda argv: torch.empty(2 ** 60), lambda argv: fail('CUDA error: out of memory'),
                 lambda argv: fail('CUDA error: CUBLAS_STATUS_ALLOC_FAILED')):
        with pytest.raises(SystemExit, match='2'):
            prepare_data.run(main)
        assert capsys.readouterr().err.startswith('x: error: not enough memory: lower --batch_size')
    with pytest.raises(SystemExit, match='2'):
        prepare_data.run(lambda argv: torch.embedding(torch.ones(2, 3), torch.tensor(2)))
    assert 'has a token for which the model has no row' in capsys.readouterr().err
    with pytest.raises(RuntimeError, match='shapes'):
        prepare_data.run(lambda argv: torch.ones(2, 3) @ torch.ones(2, 3))
