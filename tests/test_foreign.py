"""
Folders of Hugging Face: their tokenizers, and the ways of their models through the scripts, in and out.

What transformers and its package `tokenizers` say of a folder is right by definition, so they are asked too: ids, offsets,
logits, the texts that greedy decoding writes. Tokenizers are learned here from a few lines, models are tiny and random, with
weights so wide that no two logits come close to each other.
"""

import os

os.environ |= {'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_VERBOSITY': 'error', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}

import dataclasses
import json
import math
import random
import sys
import unicodedata

import numpy as np
import pytest
import torch
import transformers
from conftest import command
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import prepare_data
import sample
import train
from model import PRESETS, build, load, save
from prepare_data import (
    Foreign,
    bpe_tokenizer,
    byte_level,
    byte_tokenizer,
    char_tokenizer,
    encode,
    encode_spans,
    frame,
    load_tokenizer,
    make_tokenizer,
    qa_examples,
    tag_examples,
    tokenizer_from_dict,
    tokenizer_to_dict,
)
from sample import TextStream, forbidden_tokens, open_model, prompt_ids

transformers.utils.logging.disable_progress_bar()

LINES = ['The cat sat on the mat. It is the end of the tale.', '床前明月光，疑是地上霜。举头望明月，低头思故乡。',
         "Café déjà vu, it's 10 o'clock!", 'the dog and the cat: who won? The dog won.']
WORDS = ['the', 'The', 'CAT', 'cats', 'Café', 'cafe\u0301', 'İ', '床前', '明月光', '👋🏽', '❤\ufe0f', "it's", '10', 'won',
         'ﬁ', 'Ⅳ', 'zebra', 'o\u0308\u0323x']
SIGNS = [' ', '  ', '\n', '\n\n', '\t', '\u3000', '.', '，', '?', '\u0301', '\u200d', '<|endoftext|>', '[SEP]', '[MASK]',
         '<s>']
texts = st.lists(st.sampled_from(WORDS + SIGNS) | st.text(max_size=4), max_size=12).map(''.join)


def write(folder, **files):
    """Files of a new folder: vocab_txt='...' is vocab.txt, and what is no string is written as JSON."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        content = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        end = 'txt' if name in ('vocab_txt', 'merges') else 'json'
        (folder / f"{name.removesuffix('_txt')}.{end}").write_text(content, encoding='utf-8')
    return folder


def byte_pairs(special=()):
    """GPT-2's kind of tokenizer, as the package tokenizers learns and describes it; special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(LINES * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=[
        *special], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return json.loads(tokenizer.to_str())


def added(content, i, special=True):
    return {'id': i, 'content': content, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
            'special': special}


def gpt2_files():
    """(vocab, merges) with <|endoftext|> as the last token."""
    model = byte_pairs()['model']
    return model['vocab'] | {'<|endoftext|>': len(model['vocab'])}, model['merges']


def merges_txt(merges):
    return '#version: 0.2\n' + ''.join(f'{a} {b}\n' for a, b in merges)


def write_gpt2(folder):
    vocab, merges = gpt2_files()
    return write(folder, vocab=vocab, merges=merges_txt(merges))


LETTERS = 'abcdefghijklmnopqrstuvwxyz'
SIGNS_SEEN = sorted(set(''.join(LINES).lower()) - {*LETTERS, ' '})
BERT = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *SIGNS_SEEN, *LETTERS, *(f'##{c}' for c in LETTERS), 'the', 'cat',
        'dog', 'won', 'cafe', '##he', '床前', '##é', 'T', 'C', '##A', '##T']


def write_bert(folder, **about):
    """A vocab.txt alone, as Google's BERTs have it, with tokenizer_config.json if there is something to say."""
    return write(folder, vocab_txt='\n'.join(BERT) + '\n', **{'tokenizer_config': about} if about else {})


def write_t5(folder):
    """SentencePiece as T5 has it: <pad>, </s> and <unk> first, the sentinels last and in falling order, no <s>."""
    pieces = ['<pad>', '</s>', '<unk>', '▁', '▁the', 's', '▁cat', '▁dog', '▁won', '▁Caf', 'é', '明月', 'T',
              *SIGNS_SEEN, *LETTERS]
    scores = [0.0, 0.0, 0.0, *(-2 - 0.25 * i for i in range(len(pieces)))]
    tokenizer = Tokenizer(models.Unigram([*dict(zip(pieces, scores)).items()], unk_id=2))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(pieces[:3] + [f'<extra_id_{i}>' for i in reversed(range(100))])
    tokenizer.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    return write(folder, tokenizer=tokenizer.to_str(), tokenizer_config={
        'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '</s>', 'unk_token': '<unk>',
        'pad_token': {'__type': 'AddedToken', **added('<pad>', 0)}})


def write_llama(folder):
    """SentencePiece as Llama has it: what no token spells is written in bytes, <0x0A>; there is no padding token."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    learned.train_from_iterator(LINES[:2] * 3, trainers.BpeTrainer(vocab_size=110, show_progress=False))
    found = json.loads(learned.to_str())['model']
    vocab = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), *found['vocab']]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [(a, b) for a, b in found['merges']],
                                     unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = learned.normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(' ', 1, 0)])
    tokenizer.add_special_tokens(['<unk>', '<s>', '</s>'])
    tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return write(folder, tokenizer=tokenizer.to_str(), tokenizer_config={
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'})


WRITE = {'gpt2': write_gpt2, 'bert': write_bert, 't5': write_t5, 'llama': write_llama}
FOREIGN = ['bert', 't5', 'llama']
SIZES = {'gpt2': dict(n_positions=48, n_embd=16, n_layer=2, n_head=2),
         'bert': dict(max_position_embeddings=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=32),
         't5': dict(n_positions=48, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
         'llama': dict(max_position_embeddings=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=1, intermediate_size=24)}
CONFIGS = {'gpt2': transformers.GPT2Config, 'bert': transformers.BertConfig, 't5': transformers.T5Config,
           'llama': transformers.LlamaConfig}
WRITERS = {'gpt2': transformers.GPT2LMHeadModel, 'bert': transformers.BertForMaskedLM,
           't5': transformers.T5ForConditionalGeneration, 'llama': transformers.LlamaForCausalLM}


def random_weights(module):
    """Far apart, so that rounding never decides."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.4)
    return module.eval()


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """both(kind) -> our tokenizer and that of transformers, from one folder."""
    folder, found = tmp_path_factory.mktemp('tokenizers'), {}
    for kind, fill in WRITE.items():
        path = fill(folder / kind)
        cls = {'gpt2': transformers.GPT2Tokenizer, 'bert': transformers.BertTokenizer}.get(
            kind, transformers.PreTrainedTokenizerFast)
        found[kind] = load_tokenizer(path), cls.from_pretrained(path)
    return lambda kind: found[kind]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """{family: a folder with tokenizer and model}. T5's matrices have more rows than its tokenizer has tokens, as usual."""
    root = tmp_path_factory.mktemp('folders')
    torch.manual_seed(0)
    for family, fill in WRITE.items():
        size = load_tokenizer(fill(root / family)).n_vocab
        size = {'gpt2': 301, 't5': size + 3}.get(family, size)
        config = CONFIGS[family](vocab_size=size, **SIZES[family])
        random_weights(WRITERS[family](config)).save_pretrained(root / family)
    return {family: root / family for family in WRITE}


def said(capsys, main, *flags):
    """The lines that a script prints on standard output."""
    capsys.readouterr()
    main([*map(str, flags), '--device', 'cpu'])
    return capsys.readouterr().out.removesuffix('\n').split('\n')


def refuses(main, *flags):
    """The sentence with which a script ends. What is no ValueError and no OSError would be a traceback."""
    with pytest.raises((ValueError, OSError)) as e:
        main([*map(str, flags), '--device', 'cpu'])
    assert str(e.value) and '\n' not in str(e.value), f'not one line: {e.value}'
    return str(e.value)

# -----------------------------------------------------------------------------
# GPT-2's two files


def of_2019():
    """GPT-2's tokenizer.json as it lies on the hub: written when a model had no type and merges were strings."""
    described, (vocab, merges) = byte_pairs(), gpt2_files()
    described['added_tokens'] = [added('<|endoftext|>', len(vocab) - 1)]
    del described['pre_tokenizer']['use_regex'], described['decoder']['use_regex']
    described['model'] = {'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '', 'end_of_word_suffix': '',
                          'fuse_unk': False, 'vocab': vocab, 'merges': [' '.join(pair) for pair in merges]}
    return {'tokenizer': described}


def of_today():
    described, (vocab, _) = byte_pairs(), gpt2_files()
    described['model']['vocab'] = vocab
    return {'tokenizer': described | {'added_tokens': [added('<|endoftext|>', len(vocab) - 1)]}}


def two_files():
    vocab, merges = gpt2_files()
    return {'vocab': vocab, 'merges': merges_txt(merges)}


@pytest.mark.parametrize('files', [two_files, of_today, of_2019])
def test_gpt2_goes_through_tiktoken(files, tmp_path, monkeypatch):
    """However its folder writes it, and without the package tokenizers."""
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    tokenizer = load_tokenizer(write(tmp_path / 'gpt2', **files()))
    assert tokenizer.name == 'gpt2' and tokenizer._special_tokens['<|endoftext|>'] == 300
    assert encode(tokenizer, 'the cat').tolist() == [gpt2_files()[0][token] for token in ('the', 'Ġcat')]


@given(texts)
@example(' \n\n  the\t 床前明月光👋🏽  ')
def test_gpt2_gives_the_ids_of_transformers(both, text):
    """For any text, and any white space in it."""
    ours, theirs = both('gpt2')
    ids, right = encode(ours, text).tolist(), theirs(text, split_special_tokens=True)['input_ids']
    assert ids == right, f'{text!r}: {ids} instead of {right}'
    assert ours.decode(ids) == text


def shuffled(vocab):
    """The same tokens under other numbers, but for the end."""
    numbers = list(vocab.values())[:-1]
    random.Random(0).shuffle(numbers)
    return dict(zip(vocab, [*numbers, 300]))


def without_a_byte(vocab):
    """Byte 0xE5, with which 床 begins."""
    return {token: i for token, i in vocab.items() if token not in ('å', 'åº', 'åºĬ', 'åīį', 'åħī', 'åľ°')}


@pytest.mark.parametrize('lone', [True, False], ids=['vocab.json', 'tokenizer.json'])
@pytest.mark.parametrize('change', [shuffled, without_a_byte])
def test_a_table_that_tiktoken_cannot_say_goes_through_tokenizers(change, lone, tmp_path):
    """Ids that do not follow the merges, or a byte without a token: other ids than transformers' would be noise."""
    vocab, merges = gpt2_files()
    vocab = change(vocab)
    merges = [(a, b) for a, b in merges if a in vocab and b in vocab and a + b in vocab]
    files = {'vocab': vocab, 'merges': merges_txt(merges)}
    if not lone:
        described = byte_pairs() | {'added_tokens': [added('<|endoftext|>', vocab['<|endoftext|>'])]}
        files = {'tokenizer': described | {'model': described['model'] | {'vocab': vocab, 'merges': merges}}}
    theirs = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
    ours = load_tokenizer(write(tmp_path / 'gpt2', **files))
    assert isinstance(ours, Foreign), ours.name
    for text in [*LINES, ' the  cat\n\n 床', '👋🏽 e\u0301']:
        ids, right = encode(ours, text).tolist(), theirs(text)['input_ids']
        assert ids == right, f'{text!r}: {ids} instead of {right}'


def test_special_tokens_may_come_first(tmp_path):
    """As the trainers of tokenizers number them; the same ids after a way through JSON, which data folders take."""
    described = byte_pairs(['<|endoftext|>', '<pad>'])
    right = Tokenizer.from_str(json.dumps(described))
    ours = load_tokenizer(write(tmp_path / 'first', tokenizer=described, tokenizer_config={'eos_token': '<|endoftext|>'}))
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer_to_dict(ours))))
    for tokenizer in (ours, again):
        assert tokenizer._special_tokens['<|endoftext|>'] == 0
        for text in LINES:
            assert encode(tokenizer, text).tolist() == right.encode(text).ids, text


def test_a_token_that_was_added_as_text_is_one_token(tmp_path):
    """Added tokens need not be special: what GPT-2 was taught besides its own table is read as it was taught."""
    described = of_today()['tokenizer']
    described['added_tokens'].append(added('catmat', 301, special=False))
    ours = load_tokenizer(write(tmp_path / 'gpt2', tokenizer=described))
    ids, right = encode(ours, 'a catmat').tolist(), Tokenizer.from_str(json.dumps(described)).encode('a catmat').ids
    assert ids == right, f'{ids} instead of {right}'


@given(st.lists(texts, min_size=1, max_size=6), texts)
@settings(max_examples=15)
def test_a_learned_table_as_vocab_and_merges_gives_the_same_ids(learned_from, text):
    """tiktoken joins whatever makes the lowest token, merges are pairs: what is exported must say the same."""
    tokenizer = bpe_tokenizer([text * 3 for text in learned_from], 420)
    vocab, merges = byte_level(tokenizer)
    theirs = transformers.GPT2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in merges])
    for t in (text, *learned_from):
        ids, right = encode(tokenizer, t).tolist(), theirs(t, split_special_tokens=True)['input_ids']
        assert right == ids, f'{t!r}: {right} exported, {ids} here'

# -----------------------------------------------------------------------------
# All other tokenizers


@pytest.mark.parametrize('kind', FOREIGN)
@given(text=texts)
@example(text='  The Café 床前 cats 👋🏽\n\ne\u0301 ﬁ')
def test_ids_texts_and_offsets_are_those_of_transformers(both, kind, text):
    """WordPiece, Unigram, and BPE that falls back on bytes."""
    ours, theirs = both(kind)
    right = theirs(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    ids, spans = encode_spans(ours, text)
    assert ids.tolist() == right['input_ids'] == encode(ours, text).tolist(), f'{text!r}: {ids} instead of {right}'
    assert [tuple(span) for span in spans.tolist()] == right['offset_mapping'], f'{text!r}: {spans.tolist()}'
    assert ours.decode(ids.tolist()) == theirs.decode(right['input_ids']), text


@pytest.mark.parametrize('about', [dict(do_lower_case=False), dict(strip_accents=False), dict(tokenize_chinese_chars=False),
                                   dict(do_lower_case=False, strip_accents=True), {}], ids=str)
def test_a_vocab_txt_is_read_as_its_config_says(about, tmp_path):
    """Small letters without accents, and Chinese characters on their own, unless tokenizer_config.json says otherwise."""
    folder = write_bert(tmp_path / 'bert', **about)
    ours, theirs = load_tokenizer(folder), transformers.BertTokenizer(str(folder / 'vocab.txt'), **about)
    seen = set()
    for text in [*LINES, 'The Café CAT', 'cafe\u0301 the CAT 床前 明月']:
        ids, right = encode(ours, text).tolist(), theirs(text, add_special_tokens=False)['input_ids']
        assert ids == right, f'{text!r}: {ids} instead of {right}'
        seen |= {ours._tokenizer.id_to_token(i) for i in ids}
    assert ('the' in seen and 'T' not in seen) == about.get('do_lower_case', True), sorted(seen)
    assert ('##é' in seen) == (about.get('strip_accents', about.get('do_lower_case', True)) is False), sorted(seen)
    assert ('床前' in seen) == (about == {'tokenize_chinese_chars': False}), sorted(seen)


@pytest.mark.parametrize('kind', FOREIGN)
def test_truncation_and_padding_of_a_file_are_switched_off(kind, tmp_path):
    """A tokenizer.json may say: four tokens and no more, sixteen at least. A text is as long as it is."""
    folder = WRITE[kind](tmp_path / kind)
    plain = load_tokenizer(folder)
    cut = Tokenizer.from_str(tokenizer_to_dict(plain)['description'])
    cut.enable_truncation(4)
    cut.enable_padding(length=64)
    (folder / 'tokenizer.json').write_text(cut.to_str(), encoding='utf-8')
    for text in ('the', LINES[3]):
        ids = encode(load_tokenizer(folder), text).tolist()
        assert ids == encode(plain, text).tolist(), f'{text!r}: {ids}'


@pytest.mark.parametrize('kind', WRITE)
def test_special_tokens_written_in_a_text_are_text(kind, both):
    """Who writes </s> in a prompt does not end it."""
    ours, theirs = both(kind)
    text = 'the <s> cat</s> [SEP] <|endoftext|> <pad>[MASK] <extra_id_0> sat'
    special = set(ours._special_tokens.values()) - {theirs.unk_token_id}
    found = {i: theirs.convert_ids_to_tokens(i) for i in encode(ours, text).tolist() if i in special}
    assert not found, f'{found} in {text!r}'


@pytest.mark.parametrize('kind', WRITE)
def test_a_tokenizer_comes_back_from_its_json_as_it_was(kind, both, tmp_path):
    """From a data folder, and from a checkpoint; a second time too."""
    ours, _ = both(kind)
    saved = tokenizer_to_dict(ours)
    assert saved['format'] == prepare_data.FORMAT
    (tmp_path / 'tokenizer.json').write_text(json.dumps(saved, ensure_ascii=False), encoding='utf-8')
    save(tmp_path / 'ckpt.pt', build(dataclasses.replace(PRESETS['lstm'], vocab_size=9)), tokenizer=saved)
    for again in (load_tokenizer(tmp_path), tokenizer_from_dict(load(tmp_path / 'ckpt.pt')[1]['tokenizer'])):
        assert type(again) is type(ours) and again.n_vocab == ours.n_vocab
        assert tokenizer_to_dict(again) == saved
        for text in [*LINES, '</s> [SEP] 👋🏽']:
            assert encode(again, text).tolist() == encode(ours, text).tolist()


@pytest.mark.parametrize('kind', WRITE)
@given(text=texts)
@example(text='the 床👋🏽 cats')
def test_a_stream_shows_what_decoding_at_once_would(both, kind, text):
    """Words keep the space before them, and no character of several byte tokens is shown in halves. (b15)"""
    ours, _ = both(kind)
    ids, stream = encode(ours, text).tolist(), TextStream(both(kind)[0])
    parts = [*map(stream.add, ids), stream.end()]
    right = ours.decode(ids)
    if kind == 'bert':  # its decoder takes the space before . and ' away, which a stream has shown by then
        assert ''.join(parts).replace(' ', '') == right.replace(' ', ''), parts
    else:
        assert ''.join(parts) == ' ' * (kind != 'gpt2' and len(ids) > 0) + right, parts
    assert '\ufffd' in text or not any('\ufffd' in part for part in parts), parts


def test_words_of_a_stream_keep_the_space_before_them(both):
    """Token by token, as it is shown; the last byte of a character brings all of it. (b15)"""
    for kind in ('bert', 't5'):
        ours, _ = both(kind)
        stream = TextStream(ours)
        assert [stream.add(i) for i in encode(ours, 'the dog won').tolist()] == [' the', ' dog', ' won'], kind
    ours, _ = both('llama')
    stream = TextStream(ours)
    assert [stream.add(i) for i in encode(ours, '👋').tolist()[-4:]] == ['', '', '', '👋']


def test_the_parts_that_their_tokens_play(both):
    """Ours on the left; a BERT ends a text with [SEP], T5 begins one with its padding, Llama pads with its end."""
    for kind, parts in {'bert': {'<|endoftext|>': '[SEP]', '[PAD]': '[PAD]', '[CLS]': '[CLS]', '[MASK]': '[MASK]'},
                        't5': {'<|endoftext|>': '</s>', '<|start|>': '<pad>', '[PAD]': '<pad>', '[SEP]': '</s>',
                               '<extra_0>': '<extra_id_0>', '<extra_99>': '<extra_id_99>'},
                        'llama': {'<|endoftext|>': '</s>', '<|start|>': '<s>', '[PAD]': '</s>', '[CLS]': '<s>'}}.items():
        ours, theirs = both(kind)
        for name, their_name in parts.items():
            found = theirs.convert_ids_to_tokens(ours._special_tokens[name])
            assert found == their_name, f'{kind}: {name} is {found}, not {their_name}'
    assert '<|start|>' not in both('bert')[0]._special_tokens


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    """Nothing could ever stop."""
    described = {'model': {'type': 'WordLevel', 'vocab': {'a': 0, 'b': 1}, 'unk_token': 'a'}}
    with pytest.raises(ValueError, match='no token that ends a text'):
        load_tokenizer(write(tmp_path / 'endless', tokenizer=described))


def test_a_gpt2_without_an_end_writes_no_token_that_its_model_lacks(tmp_path, capsys):
    """An end of our own is beyond its rows: an empty prompt would begin with it."""
    vocab, merges = gpt2_files()
    del vocab['<|endoftext|>']
    folder = write(tmp_path / 'gpt2', vocab=vocab, merges=merges_txt(merges))
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(vocab), **SIZES['gpt2'])).save_pretrained(folder)
    assert 'end' in refuses(sample.main, '--init_from', folder, '--start', '')


@pytest.mark.parametrize('kind', WRITE)
def test_what_is_special_is_never_sampled_but_the_end(kind, both):
    """Neither are rows that no token has, such as the last of T5's matrices."""
    ours, theirs = both(kind)
    size = ours.n_vocab + 5
    allowed = set((~forbidden_tokens(ours, size)).nonzero()[:, 0].tolist())
    special = set(theirs.all_special_ids) | {i for i, t in theirs.added_tokens_decoder.items() if t.special}
    right = set(theirs.get_vocab().values()) - special | {ours._special_tokens['<|endoftext|>']}
    assert allowed == right, f'wrongly allowed {sorted(allowed - right)}, wrongly forbidden {sorted(right - allowed)}'


def test_a_prompt_begins_as_its_model_learned(both):
    """<s> stands before every text of a Llama and nothing before one of GPT-2, unless it is empty."""
    for prompt in ('the cat', ' 床', ''):
        ours, theirs = both('llama')
        assert prompt_ids(ours, prompt) == theirs(prompt)['input_ids']
        ours, theirs = both('gpt2')
        assert prompt_ids(ours, prompt) == (theirs(prompt)['input_ids'] or [300])

# -----------------------------------------------------------------------------
# Files that are damaged, and packages that are missing

WORD_LEVEL = {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'a'}


@pytest.mark.parametrize('files', [
    dict(tokenizer='{"version": "1.0", "model": {"ty'), dict(tokenizer='[]'), dict(tokenizer='null'), dict(tokenizer='7'),
    dict(tokenizer={'version': '1.0'}), dict(tokenizer={'model': 1}), dict(tokenizer={'model': {'type': 'BPE'}}),
    dict(tokenizer={'model': WORD_LEVEL, 'added_tokens': None}), dict(tokenizer={'model': WORD_LEVEL, 'added_tokens': [{}]}),
    dict(tokenizer={'model': {'type': 'Unigram', 'unk_id': None, 'vocab': []}}),
    dict(tokenizer={'model': {'type': 'BPE'}, 'normalizer': None, 'pre_tokenizer': {
        'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}}),
    dict(tokenizer={'model': WORD_LEVEL, 'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}}),  # panics
    dict(tokenizer={'model': WORD_LEVEL}, tokenizer_config='[]'),
    dict(tokenizer={'model': WORD_LEVEL}, tokenizer_config={'eos_token': ['a']}),
    dict(vocab='{"a": 0', merges='#version: 0.2\n'), dict(vocab='7', merges='#version: 0.2\n'),
    dict(vocab=gpt2_files()[0], merges='a b c\n'), dict(vocab_txt='the\ncat\n'), dict(merges='a b\n'),
], ids=lambda files: ' '.join(f'{name}={str(content)[:60]}' for name, content in files.items()))
def test_a_damaged_tokenizer_is_one_line(files, tmp_path):
    """Whatever is wrong with it: truncated, of another shape, or such that the package panics."""
    folder = write(tmp_path / 'damaged', **files)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        load_tokenizer(folder)
    assert str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 400, e.value


@pytest.mark.parametrize('kind', FOREIGN)
def test_without_the_package_tokenizers_a_sentence_says_what_to_install(kind, tmp_path, monkeypatch, both):
    """From a folder, and from a checkpoint that was made where the package was there."""
    folder, saved = WRITE[kind](tmp_path / kind), tokenizer_to_dict(both(kind)[0])
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    for load_it in (lambda: load_tokenizer(folder), lambda: tokenizer_from_dict(saved)):
        with pytest.raises(ValueError, match='pip install tokenizers'):
            load_it()


@pytest.mark.parametrize('kind', WRITE)
def test_half_of_a_surrogate_pair_is_one_line(kind, both):
    """JSON can hold it, and no tokenizer reads it."""
    for read in (encode, encode_spans):
        with pytest.raises(ValueError, match='not valid Unicode'):
            read(both(kind)[0], 'the \ud83d cat')


def test_a_word_for_which_there_is_no_token_is_one_line(tmp_path):
    """A vocab.txt may lack [UNK]: the first word that it cannot spell says so."""
    ours = load_tokenizer(write(tmp_path / 'bert', vocab_txt='[PAD]\n[CLS]\n[SEP]\n[MASK]\nthe\n'))
    assert encode(ours, 'the the').tolist() == [4, 4]
    with pytest.raises(ValueError, match='UNK'):
        encode(ours, 'the zebra')

# -----------------------------------------------------------------------------
# Examples of tasks

words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8)


def visible(text):
    """Without what some tokenizers drop: accents of their own, joiners, and the looks of a sign."""
    return ''.join(c for c in unicodedata.normalize('NFD', text) if unicodedata.category(c) not in ('Mn', 'Cf')).strip()


@given(words, words)
def test_bert_reads_pairs_as_transformers_frames_them(both, first, second):
    """[CLS] a [SEP] b [SEP], with segments 0 up to the first [SEP]."""
    ours, theirs = both('bert')
    for parts in ([' '.join(first)], [' '.join(first), ' '.join(second)]):
        ids, segments = frame(ours, *(encode(ours, text).tolist() for text in parts))
        right = theirs(*parts)
        assert ids == right['input_ids'] and segments == right['token_type_ids'], f'{parts}: {ids} {segments}'


@pytest.mark.parametrize('kind', WRITE)
@given(tokens=words)
@example(tokens=['Café', '床前', 'zebra', 'cafe\u0301', '❤\ufe0f'])
def test_the_first_piece_of_each_word_carries_its_tag(both, kind, tokens):
    """Also of words that small letters, Chinese splitting or a normal form change."""
    ours, _ = both(kind)
    labels = ['O', *(f'B-{i}' for i in range(len(tokens)))]
    [one] = tag_examples(ours, {'tokens': tokens, 'tags': labels[1:]}, labels, 512)
    _, spans = encode_spans(ours, ' '.join(tokens))
    start = 0
    for i, (token, at) in enumerate(zip(tokens, one['about']['where'])):
        own = [t + 1 for t, (a, b) in enumerate(spans.tolist()) if a < start + len(token) and b > start]
        assert at == own[0] and one['targets'][at] == i + 1, f'{tokens}: {token!r} is asked at {at}, its pieces are {own}'
        start += len(token) + 1
    assert sum(target >= 0 for target in one['targets']) == len(tokens)


@pytest.mark.parametrize('kind', WRITE)
@given(tokens=words, first=st.integers(0, 7), length=st.integers(1, 8))
@example(tokens=['zebra', 'cafe\u0301', 'the'], first=1, length=1)
@example(tokens=['床前', 'Café', '明月光'], first=1, length=2)
def test_the_gold_answer_stands_where_the_targets_point(both, kind, tokens, first, length):
    """Offsets count characters of the original text, whatever accents, capitals and Chinese become in the tokenizer."""
    ours, _ = both(kind)
    first %= len(tokens)
    text, gold, start = ' '.join(tokens), ' '.join(tokens[first:first + length]), len(' '.join([*tokens[:first], '']))
    row = {'id': '1', 'question': 'who?', 'context': text, 'answers': [(start, gold)]}
    [one] = qa_examples(ours, row, [], 512)
    (first, last), about = one['targets'], one['about']
    low, high = about['offsets'][first - about['first']][0], about['offsets'][last - about['first']][1]
    found = about['context'][low:high]
    assert visible(found) == visible(gold), f'{found!r} instead of {gold!r} in {text!r}'


@pytest.mark.parametrize('ending', ['❤\ufe0f', 'cafe\u0301', 'cat\u200d', 'cat\x00'], ids=ascii)
def test_an_answer_may_end_in_what_its_tokenizer_drops(both, ending):
    """BERT forgets accents and joiners: the answer ends with the last character that a token has."""
    for text in (f'it is the {ending}', f'it is the {ending} cat'):
        row = {'id': '1', 'question': 'what?', 'context': text, 'answers': [(10, ending)]}
        [one] = qa_examples(both('bert')[0], row, [], 64)
        (first, last), about = one['targets'], one['about']
        low, high = about['offsets'][first - about['first']][0], about['offsets'][last - about['first']][1]
        assert text[low:high].strip('\u200d\x00') and ending.startswith(text[low:high]), f'{text[low:high]!r} of {text!r}'


@pytest.mark.parametrize('kind', WRITE)
def test_sentences_begin_at_the_tokens_that_begin_them(kind, folders, tmp_path, capsys):
    """The table of a data folder counts tokens, and theirs have no bytes of their own to count."""
    said_by = ['The cat sat. ', 'Café déjà vu! ', '床前明月光。 ', 'e\u0301 x?  ', 'The dog won.\n\n', 'it is the end. ',
               '👋🏽 the cat.']
    (tmp_path / 'a.txt').write_text(''.join(said_by), encoding='utf-8')
    (tmp_path / 'b.txt').write_text('the mat. the end.', encoding='utf-8')
    prepare_data.main(['--input', str(tmp_path / 'a.txt'), '--val', str(tmp_path / 'b.txt'), '--tokenizer',
                       str(folders[kind]), '--out_dir', str(tmp_path / 'data')])
    tokenizer, ids = load_tokenizer(tmp_path / 'data'), np.fromfile(tmp_path / 'data' / 'train.bin', np.uint16)
    starts = np.load(tmp_path / 'data' / 'train.sentences.npy')[:, 0].tolist()
    assert ids[-1] == tokenizer._special_tokens['<|endoftext|>'] and len(starts) == len(said_by), starts
    for begin, end, sentence in zip(starts, [*starts[1:], len(ids) - 1], said_by):
        right = encode(tokenizer, sentence.strip()).tolist()
        found = tokenizer.decode(ids[begin:end].tolist()).strip()
        assert found.startswith(tokenizer.decode(right).strip()), f'{found!r} instead of {sentence!r}'

# -----------------------------------------------------------------------------
# From a folder: sample.py


def greedy(model, ours, ids, n=12):
    """The new ids that transformers' own generate() chooses, special tokens suppressed as here."""
    hidden = forbidden_tokens(ours, model.config.vocab_size).nonzero()[:, 0].tolist()
    end_id = ours._special_tokens['<|endoftext|>']
    out = model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False, suppress_tokens=hidden, eos_token_id=end_id,
                         pad_token_id=end_id)[0].tolist()
    new = out[1:] if model.config.is_encoder_decoder else out[len(ids):]
    return new[:new.index(end_id)] if end_id in new else new


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
@pytest.mark.parametrize('start', ['the cat', 'Café 床前', ''])
def test_a_folder_writes_what_transformers_would(family, start, folders, both, capsys):
    """sample.py --init_from FOLDER, greedy."""
    (ours, _), model = both(family), WRITERS[family].from_pretrained(folders[family])
    new = greedy(model, ours, prompt_ids(ours, start))
    right = start + b''.join(map(ours.decode_single_token_bytes, new)).decode(errors='replace')
    flags = ('--init_from', folders[family], '--start', start, '--temperature', 0, '--max_new_tokens', 12)
    assert '\n'.join(said(capsys, sample.main, *flags)) == right
    assert '\n'.join(said(capsys, sample.main, *flags, '--stream')) == right


def test_an_encoder_decoder_answers_as_transformers_would(folders, both, capsys):
    """T5: the source ends in </s>, the decoder begins with the padding token and ends with </s>."""
    (ours, theirs), model = both('t5'), WRITERS['t5'].from_pretrained(folders['t5'])
    sources = ['the cat', 'Café 床前明月光', 'who won?']
    right = [theirs.decode(greedy(model, ours, theirs(text)['input_ids'])) for text in sources]
    assert len(set(right)) > 1, right
    found = said(capsys, sample.main, '--init_from', folders['t5'], '--start', '\n'.join(sources), '--max_new_tokens', 12)
    assert found == [' '.join(text.split()) for text in right]


def test_a_decoder_begins_with_the_token_that_config_json_names(both, tmp_path, capsys):
    """A T5 that was made without sentinels begins with its padding too."""
    folder = write_t5(tmp_path / 't5')
    described = json.loads((folder / 'tokenizer.json').read_text(encoding='utf-8'))
    described['added_tokens'] = described['added_tokens'][:3]
    (folder / 'tokenizer.json').write_text(json.dumps(described), encoding='utf-8')
    (ours, theirs), model = both('t5'), WRITERS['t5'](transformers.T5Config(vocab_size=66, **SIZES['t5']))
    random_weights(model).save_pretrained(folder)
    right = theirs.decode(greedy(model, ours, theirs('the cat')['input_ids']))
    [found] = said(capsys, sample.main, '--init_from', folder, '--start', 'the cat', '--max_new_tokens', 12)
    assert found == ' '.join(right.split()), f'{found!r} instead of {right!r}'


def test_masks_are_filled_with_what_transformers_finds_likeliest(folders, both, capsys):
    """BERT from a folder: the five best of each [MASK], special tokens left out; of a pair too."""
    (_, theirs), model = both('bert'), WRITERS['bert'].from_pretrained(folders['bert'])
    for start in ('The [MASK] sat on [MASK].', '床 ||| the [MASK]'):
        inputs = theirs(*start.split(' ||| '), return_tensors='pt')
        with torch.no_grad():
            logits = model(**inputs).logits[0][inputs['input_ids'][0] == theirs.mask_token_id]
        logits[:, theirs.all_special_ids] = -math.inf
        right = [[(theirs.decode([i]), p) for p, i in zip(*(t.tolist() for t in row))]
                 for row in zip(*logits.softmax(dim=-1).topk(5))]
        [line] = said(capsys, sample.main, '--init_from', folders['bert'], '--start', start, '--json')
        for found, best in zip(json.loads(line)['guesses'], right, strict=True):
            assert [text for text, _ in found] == [text for text, _ in best], start
            assert np.allclose([p for _, p in found], [p for _, p in best], atol=1e-5), (found, best)


HEADS = {'classify': transformers.BertForSequenceClassification, 'tag': transformers.BertForTokenClassification,
         'qa': transformers.BertForQuestionAnswering}


@pytest.fixture(scope='module')
def heads(folders, tmp_path_factory):
    """BERTs with a head and labels, one for each task."""
    found, labels = {}, {'classify': ['不', 'yes', 'maybe'], 'tag': ['O', 'B-animal', 'I-animal'], 'qa': ['a', 'b']}
    for task, cls in HEADS.items():
        folder = write_bert(tmp_path_factory.mktemp('heads') / task)
        config = transformers.BertConfig(vocab_size=load_tokenizer(folder).n_vocab, id2label=dict(enumerate(labels[task])),
                                         label2id={label: i for i, label in enumerate(labels[task])}, **SIZES['bert'])
        random_weights(cls(config)).save_pretrained(folder)
        found[task] = folder
    return found


def test_heads_of_bert_answer_as_in_transformers(heads, both, capsys):
    """A label and its probability, a tag for every word, a span of the context."""
    _, theirs = both('bert')
    model = {task: cls.from_pretrained(heads[task]) for task, cls in HEADS.items()}
    logits = lambda task, *texts: model[task](**theirs(*texts, return_tensors='pt'))
    ask = lambda task, start: json.loads(*said(capsys, sample.main, '--init_from', heads[task], '--start', start, '--json'))
    with torch.no_grad():
        for start in ('the Café', 'the cat ||| 床前'):
            p = logits('classify', *start.split(' ||| ')).logits[0].softmax(dim=-1)
            found = ask('classify', start)
            assert found['label'] == model['classify'].config.id2label[p.argmax().item()], found
            assert math.isclose(found['probability'], p.max().item(), abs_tol=1e-5), found

        text = 'the Café cats 床前'
        pieces = theirs(text).word_ids()
        best = logits('tag', text).logits[0].argmax(dim=-1).tolist()
        right = [model['tag'].config.id2label[best[pieces.index(word)]] for word in range(len(set(pieces)) - 1)]
        found = ask('tag', text)
        assert found['tags'] == right and found['tokens'] == ['the', 'Café', 'cats', '床', '前'], found

        question, context = 'who won?', 'The Café dog won 床前.'
        found, out = ask('qa', f'{question} ||| {context}'), logits('qa', question, context)
        p = out.start_logits[0].softmax(dim=-1)[:, None] * out.end_logits[0].softmax(dim=-1)
        encoded = theirs(question, context, return_offsets_mapping=True)
        inside = torch.tensor([word == 1 for word in encoded.sequence_ids()])
        first, last = divmod((p * inside[:, None] * inside).triu().argmax().item(), len(inside))
        low, high = encoded['offset_mapping'][first][0], encoded['offset_mapping'][last][1]
        assert found['answer'] == context[low:high] and found['start'] == low, found


def test_what_has_nothing_to_say_is_refused_in_one_line(folders, tmp_path):
    """A bare encoder, and a model without a tokenizer; as a user sees it: one line, exit status 2, nothing on stdout."""
    bare = write_bert(tmp_path / 'bare')
    transformers.BertModel(transformers.BertConfig(vocab_size=len(BERT), **SIZES['bert'])).save_pretrained(bare)
    assert f'--init_from {bare}' in refuses(sample.main, '--init_from', bare, '--start', 'the [MASK]')
    mute = tmp_path / 'mute'
    WRITERS['gpt2'].from_pretrained(folders['gpt2']).save_pretrained(mute)
    result = command('sample.py', '--init_from', mute, '--start', 'the cat', cwd=tmp_path, status=2)
    assert not result.stdout and result.stderr.count('\n') == 1 and 'no tokenizer' in result.stderr, result.stderr

# -----------------------------------------------------------------------------
# From a folder: train.py

ANIMALS = ['cat', 'dog', 'tale']
ASKED = {'lm': 'the cat', 'classify': 'the cat ||| 床前', 'tag': 'Café 床前 cats', 'qa': 'who won? ||| the cat won',
         'seq2seq': 'the'}
WAYS = [('gpt2', 'lm'), ('gpt2', 'classify'), ('gpt2', 'seq2seq'), ('bert', 'lm'), ('bert', 'classify'), ('bert', 'tag'),
        ('bert', 'qa'), ('t5', 'lm'), ('t5', 'seq2seq'), ('llama', 'lm'), ('llama', 'tag'), ('llama', 'seq2seq')]
QUICK = ['--batch_size', 2, '--eval_interval', 2, '--eval_iters', 1, '--dtype', 'float32', '--sample_tokens', 5]


@pytest.fixture(scope='module')
def data(folders, tmp_path_factory):
    """{(family, task): a data folder}, prepared as a user would, with --tokenizer FOLDER."""
    root = tmp_path_factory.mktemp('data')
    story = 'the {} won. Café was here. 床前明月光'
    inputs = {
        'lm': '\n<|endoftext|>\n'.join(['\n\n'.join(LINES)] * 12),
        'classify': ''.join(f'yes\tthe {a} sat\tCafé {b}\n不\t床前明月光 the {a}\t{b}\n' for a in ANIMALS for b in ANIMALS),
        'tag': ''.join(f'the O\n{a} B-animal\nCafé B-place\n床前 I-place\n\n' for a in ANIMALS * 4),
        'seq2seq': ''.join(f'the {a}\tCafé {b}\n' for a in ANIMALS for b in ('明月', 'end', 'won')),
        'qa': json.dumps({'data': [{'paragraphs': [{'context': story.format(a), 'qas': [
            {'id': f'{a}{answer}', 'question': question, 'answers': [
                {'text': answer, 'answer_start': story.format(a).index(answer)}]}
            for question, answer in (('who won?', a), ('where?', 'Café'), ('月?', '明月'))]}]} for a in ANIMALS]})}
    found = {}
    for task, text in inputs.items():
        path = root / f'{task}.{ {"qa": "json", "tag": "conll"}.get(task, "txt") }'
        path.write_text(text, encoding='utf-8')
        for family in folders:
            found[family, task] = root / f'{family}-{task}'
            prepare_data.main(['--input', str(path), '--task', task, '--tokenizer', str(folders[family]), '--val_fraction',
                               '0.25', '--block_size', '48', '--out_dir', str(found[family, task])])
    return found


@pytest.mark.parametrize('family, task', WAYS)
def test_a_folder_is_tuned_resumed_and_asked(family, task, folders, data, tmp_path, capsys):
    """The whole way of a user: fine-tune, go on, ask the result; the tokenizer of the folder comes along."""
    out = tmp_path / 'out'
    lines = said(capsys, train.main, '--init_from', folders[family], '--dataset', data[family, task], '--out_dir', out,
                 '--max_iters', 2, *QUICK)
    assert lines[-1].startswith('done: 2 steps'), lines
    assert any(line.startswith('step 2: train loss') for line in lines), lines
    lines = said(capsys, train.main, '--init_from', 'resume', '--out_dir', out, '--max_iters', 3)
    assert any('resumed at step 2' in line for line in lines) and lines[-1].startswith('done: 3 steps'), lines
    start = ASKED[task] + (' [MASK]' if (family, task) == ('bert', 'lm') else '')
    found = said(capsys, sample.main, '--out_dir', out, '--start', start, '--max_new_tokens', 5)
    assert found != [''] or task == 'seq2seq', found
    checkpoint = torch.load(out / 'ckpt.pt', weights_only=True)
    assert checkpoint['tokenizer'] == tokenizer_to_dict(load_tokenizer(folders[family])) and checkpoint['step'] == 3


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_the_loss_of_a_folder_is_that_of_transformers(family, folders, data, capsys):
    """train.py --init_from FOLDER --eval_only: the mean over all tokens but the first, in windows of block_size."""
    [line] = said(capsys, train.main, '--init_from', folders[family], '--dataset', data[family, 'lm'], '--eval_only',
                  '--dtype', 'float32')
    tokens = torch.from_numpy(np.fromfile(data[family, 'lm'] / 'val.bin', np.uint16).astype(np.int64))
    model, nats, T = WRITERS[family].from_pretrained(folders[family]), 0.0, 48
    with torch.no_grad():
        for s in range(0, len(tokens) - 1, T):
            window = tokens[s:s + T + 1]
            nats += torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction='sum').item()
    right = f'val loss {nats / (len(tokens) - 1):.4f}, '
    assert line.startswith(right), f'{line!r} instead of {right!r}'


def test_the_loss_of_text_to_text_is_that_of_transformers(folders, data, capsys):
    """Which shifts the labels behind the padding token, and counts </s>."""
    [line] = said(capsys, train.main, '--init_from', folders['t5'], '--dataset', data['t5', 'seq2seq'], '--eval_only',
                  '--dtype', 'float32')
    model, nats, n = WRITERS['t5'].from_pretrained(folders['t5']), 0.0, 0
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders['t5'])
    with torch.no_grad():
        for row in map(json.loads, (data['t5', 'seq2seq'] / 'val.jsonl').read_text(encoding='utf-8').splitlines()):
            ids, labels = (theirs(row['about'][name], return_tensors='pt')['input_ids'] for name in ('source', 'target'))
            nats, n = nats + model(input_ids=ids, labels=labels).loss.item() * labels.numel(), n + labels.numel()
    found = float(line.split()[2].rstrip(','))
    assert math.isclose(found, nats / n, rel_tol=1e-4), f'{found} instead of {nats / n}'


def test_rows_are_added_to_gpt2_for_special_tokens_that_it_lacks(folders, data, tmp_path, capsys):
    """It is said; the old rows stay as they were; the new ones are never text, and never exported."""
    out = tmp_path / 'out'
    lines = said(capsys, train.main, '--init_from', folders['gpt2'], '--dataset', data['gpt2', 'seq2seq'], '--out_dir', out,
                 '--max_iters', 0, *QUICK)
    assert any('104 rows added to its vocabulary' in line for line in lines), lines
    old, (model, checkpoint) = WRITERS['gpt2'].from_pretrained(folders['gpt2']), open_model(out)
    rows = model.tokens.weight
    assert model.config.vocab_size == 405 and torch.equal(rows[:301], old.transformer.wte.weight)
    assert len(rows[301:].unique(dim=0)) == 104 and (rows[301:] - rows[:301].mean(dim=0)).abs().max() < 0.1
    hidden = forbidden_tokens(tokenizer_from_dict(checkpoint['tokenizer']), 405)
    assert hidden[301:].all() and not hidden[:301].any()
    sample.main(['--out_dir', str(out), '--export', str(tmp_path / 'back'), '--device', 'cpu'])
    back = WRITERS['gpt2'].from_pretrained(tmp_path / 'back')
    assert back.config.vocab_size == 301
    for name, p in old.state_dict().items():
        assert torch.equal(p, back.state_dict()[name]), name


def test_a_folder_is_evaluated_on_data_whose_special_tokens_it_lacks(folders, data, capsys):
    """GPT-2 has no [SEP]: a loss, or one line that says why not, but no traceback."""
    try:
        lines = said(capsys, train.main, '--init_from', folders['gpt2'], '--dataset', data['gpt2', 'seq2seq'], '--eval_only')
        assert lines[-1].startswith('val loss'), lines
    except ValueError as e:
        assert '\n' not in str(e)


def test_gpt2_learns_plain_text_from_labelled_data(folders, data, tmp_path, capsys):
    """The ids of [CLS] and [SEP] stand in it, which GPT-2 lacks too."""
    lines = said(capsys, train.main, '--init_from', folders['gpt2'], '--dataset', data['gpt2', 'classify'], '--objective',
                 'causal_lm', '--out_dir', tmp_path / 'out', '--max_iters', 1, *QUICK)
    assert lines[-1].startswith('done: 1 step'), lines


def test_a_folder_without_tokenizer_is_trained_with_that_of_the_data(folders, data, tmp_path, capsys):
    """And can speak from then on. Data with more tokens than the model has rows is refused in one line."""
    mute, small = tmp_path / 'mute', tmp_path / 'small'
    WRITERS['gpt2'].from_pretrained(folders['gpt2']).save_pretrained(mute)
    lm = data['gpt2', 'lm']
    said(capsys, train.main, '--init_from', mute, '--dataset', lm, '--out_dir', tmp_path / 'out', '--max_iters', 1, *QUICK)
    assert said(capsys, sample.main, '--out_dir', tmp_path / 'out', '--start', 'the')[0].startswith('the')
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=90, **SIZES['gpt2'])).save_pretrained(small)
    sentence = refuses(train.main, '--init_from', small, '--dataset', lm, '--out_dir', tmp_path / 'no', *QUICK)
    assert '90' in sentence and not (tmp_path / 'no').exists(), sentence


@pytest.mark.parametrize('preset, missing', [('bert', '[MASK]'), ('t5', '<extra_0>')])
def test_an_objective_without_its_special_tokens_is_refused(preset, missing, data, tmp_path):
    """A Llama's tokenizer has no [MASK] and no sentinels, so nothing can be hidden behind them."""
    sentence = refuses(train.main, '--preset', preset, '--dataset', data['llama', 'lm'], '--out_dir', tmp_path / 'out',
                       '--n_embd', 16, '--n_head', 2, '--block_size', 16, *QUICK)
    assert missing in sentence and not (tmp_path / 'out').exists(), sentence


def test_data_of_another_tokenizer_is_refused(folders, data, tmp_path):
    """Ids of one vocabulary mean nothing in another, though all are small enough."""
    out = tmp_path / 'out'
    sentence = refuses(train.main, '--init_from', folders['llama'], '--dataset', data['bert', 'lm'], '--out_dir', out)
    assert 'another tokenizer' in sentence and not out.exists(), sentence


def nanogpt(path, vocab_size):
    """A ckpt.pt as nanoGPT writes it."""
    C, T = 4, 16
    shapes = {'wte.weight': (vocab_size, C), 'wpe.weight': (T, C), 'ln_f.weight': (C,), 'ln_f.bias': (C,)}
    for part, n, m in (('attn.c_attn', 3 * C, C), ('attn.c_proj', C, C), ('mlp.c_fc', 4 * C, C), ('mlp.c_proj', C, 4 * C)):
        shapes |= {f'h.0.{part}.weight': (n, m), f'h.0.{part}.bias': (n,)}
    shapes |= {f'h.0.ln_{i}.{end}': (C,) for i in (1, 2) for end in ('weight', 'bias')}
    weights = {f'_orig_mod.transformer.{name}': torch.randn(shape) for name, shape in shapes.items()}
    weights['_orig_mod.lm_head.weight'] = weights['_orig_mod.transformer.wte.weight']
    path.parent.mkdir(exist_ok=True)
    torch.save({'model': weights, 'model_args': dict(n_layer=1, n_head=2, n_embd=C, block_size=T, bias=True, dropout=0.0,
                                                     vocab_size=vocab_size), 'config': {'dataset': 'openwebtext'}}, path)
    return path


@pytest.mark.parametrize('place', ['file', 'folder'])
def test_a_checkpoint_of_nanogpt_with_gpt2s_size_gets_its_tokenizer(place, tmp_path, monkeypatch):
    """50304 is 50257 rounded up; of another vocabulary nobody knows what its ids mean."""
    monkeypatch.setattr(sample, 'gpt2_tokenizer', lambda: make_tokenizer('gpt2', '.', {b'a': 0}, {'<|endoftext|>': 50256}))
    find = lambda path: path if place == 'file' else path.parent
    for size in (50257, 50304):
        _, checkpoint = open_model(find(nanogpt(tmp_path / str(size) / 'ckpt.pt', size)))
        assert checkpoint['tokenizer'] and checkpoint['tokenizer']['name'] == 'gpt2', size
    path = find(nanogpt(tmp_path / '65' / 'ckpt.pt', 65))
    assert not open_model(path)[1]['tokenizer']
    assert 'no tokenizer' in refuses(sample.main, '--init_from', path, '--start', 'the')


def test_a_checkpoint_of_nanogpt_writes_and_goes_to_transformers(shared, tmp_path, monkeypatch, capsys):
    """With GPT-2's own table; what the padding of its matrix holds is never sampled and stays behind."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(shared / 'tiktoken_cache'))
    path = nanogpt(tmp_path / 'ckpt.pt', 50304)
    model, checkpoint = open_model(path)
    assert forbidden_tokens(tokenizer_from_dict(checkpoint['tokenizer']), 50304)[50257:].all()
    assert said(capsys, sample.main, '--init_from', path, '--start', '床前', '--max_new_tokens', 4)[0].startswith('床前')
    sample.main(['--init_from', str(path), '--export', str(tmp_path / 'gpt2'), '--device', 'cpu'])
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'gpt2')
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / 'gpt2')('Café 床前 the', return_tensors='pt')['input_ids']
    assert ids[0].tolist() == encode(load_tokenizer(tmp_path / 'gpt2'), 'Café 床前 the').tolist()
    with torch.no_grad():
        assert torch.allclose(back(ids).logits, model.eval()(ids)[0][..., :50257], atol=1e-4)

# -----------------------------------------------------------------------------
# To a folder: sample.py --export

TOKENIZERS = {'char': lambda: char_tokenizer(set(''.join(LINES) + '\n👋🏽')), 'byte': byte_tokenizer,
              'bpe': lambda: bpe_tokenizer(LINES * 3, 420)}
AUTO = {'gpt2': transformers.AutoModelForCausalLM, 'llama': transformers.AutoModelForCausalLM,
        't5': transformers.AutoModelForSeq2SeqLM, 'bert': transformers.AutoModelForPreTraining}


def trained(path, preset, tokenizer, task='', labels=()):
    """A checkpoint as train.py leaves it: (model, folder)."""
    config = dataclasses.replace(PRESETS[preset], vocab_size=tokenizer.n_vocab, block_size=32, n_layer=2, n_head=2,
                                 n_embd=16, head_dim=8, mlp_dim=24, n_kv_head=1 if preset == 'llama' else 0, task=task,
                                 n_labels=len(labels))
    model = random_weights(build(config))
    path.mkdir()
    save(path / 'ckpt.pt', model, tokenizer=tokenizer_to_dict(tokenizer), task=task, labels=list(labels), step=1)
    return model, path


@pytest.mark.parametrize('preset, kind', [('gpt2', 'char'), ('gpt2', 'bpe'), ('llama', 'byte'), ('llama', 'bpe'),
                                          ('bert', 'char'), ('bert', 'bpe'), ('t5', 'byte'), ('t5', 'bpe')])
def test_what_is_trained_here_is_loaded_by_transformers(preset, kind, tmp_path, capsys):
    """The same ids, the same logits, the same greedy texts, no weight missing; and read back, the same bits."""
    tokenizer = TOKENIZERS[kind]()
    model, out = trained(tmp_path / 'out', preset, tokenizer)
    folder = tmp_path / 'exported'
    assert str(folder) in said(capsys, sample.main, '--out_dir', out, '--export', folder)[0]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    there, info = AUTO[preset].from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    back, checkpoint = open_model(folder)
    again = tokenizer_from_dict(checkpoint['tokenizer'])
    for text in [*LINES, '  the\n\ncat 床', '']:
        ids = encode(tokenizer, text).tolist()
        assert theirs(text, add_special_tokens=False)['input_ids'] == ids == encode(again, text).tolist(), text
        assert theirs.decode(ids) == text == again.decode(ids)
    for name, p in model.state_dict().items():
        assert torch.equal(p, back.state_dict()[name]), name
    special, end_id = tokenizer._special_tokens, tokenizer._special_tokens['<|endoftext|>']
    assert special.items() <= again._special_tokens.items()
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (end_id, special['[PAD]'], special['[MASK]'])
    assert there.config.eos_token_id == end_id and there.config.pad_token_id == special['[PAD]'], there.config
    assert preset != 't5' or there.config.decoder_start_token_id == end_id, there.config

    ids = torch.tensor([encode(tokenizer, 'the cat').tolist()])
    with torch.no_grad():
        if preset == 'bert':
            assert torch.allclose(there(ids).prediction_logits, model(ids)[0], atol=1e-4)
            return
        inputs = {'decoder_input_ids': ids[:, :3]} if preset == 't5' else {}
        ours = model(ids, **{name.replace('input_', ''): t for name, t in inputs.items()})[0]
        assert torch.allclose(there(ids, **inputs).logits, ours, atol=1e-4)
    found = said(capsys, sample.main, '--out_dir', out, '--start', 'the cat', '--temperature', 0, '--max_new_tokens', 9)
    source = [*ids[0].tolist(), *[end_id] * (preset == 't5')]
    text = tokenizer.decode(greedy(there, tokenizer, source, 9))
    assert '\n'.join(found) == (' '.join(text.split()) if preset == 't5' else 'the cat' + text)


@pytest.mark.parametrize('task, labels', [('classify', ['不', 'yes']), ('tag', ['O', 'B-地', 'I-地']), ('qa', [])])
def test_heads_and_their_labels_go_to_transformers(task, labels, tmp_path, capsys):
    """BERT with a head: id2label has the names, the classes give the logits."""
    tokenizer = bpe_tokenizer(LINES * 3, 420)
    model, out = trained(tmp_path / 'out', 'bert', tokenizer, task, labels)
    said(capsys, sample.main, '--out_dir', out, '--export', tmp_path / 'there')
    auto = {'classify': transformers.AutoModelForSequenceClassification, 'tag': transformers.AutoModelForTokenClassification,
            'qa': transformers.AutoModelForQuestionAnswering}[task]
    there, info = auto.from_pretrained(tmp_path / 'there', output_loading_info=True)
    assert not any(info.values()), info
    if labels:
        assert there.config.id2label == dict(enumerate(labels)), there.config.id2label
        assert there.config.label2id == {label: i for i, label in enumerate(labels)}, there.config.label2id
    ids, segments = frame(tokenizer, *(encode(tokenizer, text).tolist() for text in ('the cat', 'Café 床前')))
    ids, segments = torch.tensor([ids]), torch.tensor([segments])
    with torch.no_grad():
        right, _ = model(ids, segments)
        found = there(input_ids=ids, token_type_ids=segments)
    found = torch.stack([found.start_logits, found.end_logits], dim=1) if task == 'qa' else found.logits
    assert torch.allclose(found, right, atol=1e-4), (found - right).abs().max()
    back, checkpoint = open_model(tmp_path / 'there')
    assert (checkpoint['task'], checkpoint['labels']) == (task, labels)
    for name, p in model.state_dict().items():  # of the head for masks, and of a pooler that nobody reads, nothing is left
        if name.startswith(('head', 'trunk.encoder', 'trunk.tokens', 'trunk.pooler' if task == 'classify' else 'head')):
            assert torch.equal(p, back.state_dict()[name]), name


@pytest.mark.parametrize('family', WRITE)
def test_a_folder_that_went_through_here_is_the_same(family, folders, both, tmp_path, capsys):
    """In and out again: tokens, weights, and the ids of special tokens."""
    (ours, theirs), back = both(family), tmp_path / 'back'
    said(capsys, sample.main, '--init_from', folders[family], '--export', back)
    again = transformers.AutoTokenizer.from_pretrained(back)
    for text in [*LINES, ' e\u0301 ﬁ 👋🏽']:
        ids, right = (tokenizer(text, add_special_tokens=False)['input_ids'] for tokenizer in (again, theirs))
        assert ids == right, f'{text!r}: {ids} instead of {right}'
    assert again.eos_token_id == ours._special_tokens['<|endoftext|>']
    auto = {'bert': transformers.BertForMaskedLM}.get(family, AUTO[family])
    right = WRITERS[family].from_pretrained(folders[family]).state_dict()
    for name, p in auto.from_pretrained(back).state_dict().items():
        assert torch.equal(p, right[name]), name


def test_tokens_that_gpt2_was_given_by_others_are_exported(tmp_path, capsys):
    """A folder whose GPT-2 has a <pad> of its own: what is added here stays behind, what came with it does not."""
    described = of_today()['tokenizer']
    described['added_tokens'].append(added('<pad>', 301))
    folder = write(tmp_path / 'gpt2', tokenizer=described, tokenizer_config={
        'eos_token': '<|endoftext|>', 'pad_token': '<pad>'})
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=302, **SIZES['gpt2'])).save_pretrained(folder)
    said(capsys, sample.main, '--init_from', folder, '--export', tmp_path / 'back')
    assert load(tmp_path / 'back')[0].config.vocab_size == 302
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'back').convert_tokens_to_ids('<pad>') == 301


def test_a_bert_keeps_its_mask_whatever_its_tokenizer(folders, tmp_path, capsys):
    """On GPT-2's table [CLS], [SEP] and [MASK] are rows that were added, and a BERT is nothing without them."""
    tokenizer = load_tokenizer(folders['gpt2'])
    _, out = trained(tmp_path / 'out', 'bert', tokenizer)
    said(capsys, sample.main, '--out_dir', out, '--export', tmp_path / 'there')
    right, found = (said(capsys, sample.main, '--init_from', path, '--start', 'the [MASK] sat')
                    for path in (out, tmp_path / 'there'))
    assert found == right, f'{found} instead of {right}'


def test_an_export_that_cannot_be_leaves_nothing(tmp_path):
    """A model that no class computes, a table that is not made of pairs, a folder that holds something: one line each."""
    _, out = trained(tmp_path / 'nano', 'nano', byte_tokenizer())
    result = command('sample.py', '--out_dir', out, '--export', tmp_path / 'there', cwd=tmp_path, status=2)
    assert not result.stdout and result.stderr.count('\n') == 1 and 'logit_cap' in result.stderr, result.stderr
    assert not (tmp_path / 'there').exists()
    _, out = trained(tmp_path / 'llama', 'llama', byte_tokenizer())
    full = write(tmp_path / 'full', notes={'mine': 1})
    assert 'not empty' in refuses(sample.main, '--out_dir', out, '--export', full)
    assert [path.name for path in full.iterdir()] == ['notes.json']
    odd = make_tokenizer('bpe', prepare_data.PATTERNS['bpe'], {bytes([b]): b for b in range(256)} | {b'cat': 256})
    _, out = trained(tmp_path / 'odd', 'gpt2', odd)
    assert 'cat' in refuses(sample.main, '--out_dir', out, '--export', tmp_path / 'there')
    assert not (tmp_path / 'there').exists(), sorted(path.name for path in (tmp_path / 'there').iterdir())


def test_without_the_package_safetensors_a_sentence_says_what_to_install(folders, tmp_path, monkeypatch):
    """To export, and to open a folder."""
    _, out = trained(tmp_path / 'out', 'gpt2', byte_tokenizer())
    for name in ('safetensors', 'safetensors.torch'):
        monkeypatch.setitem(sys.modules, name, None)
    assert 'pip install safetensors' in refuses(sample.main, '--out_dir', out, '--export', tmp_path / 'there')
    assert 'pip install safetensors' in refuses(sample.main, '--init_from', folders['gpt2'], '--start', 'the')
    assert not (tmp_path / 'there').exists()
