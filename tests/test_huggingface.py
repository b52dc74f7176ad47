"""
Hugging Face folders: what is read of them, and what sample.py exports. The package transformers is
right by definition: logits, losses, token ids and generated texts are compared with its own. Models
are tiny and random, tokenizers learn from four lines; nothing is downloaded.
"""

import os

os.environ |= {'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_VERBOSITY': 'error'}

import dataclasses
import json
import re
import runpy
import shutil

import huggingface_hub
import pytest
import tokenizers as hf
import torch
import transformers
from conftest import close, command, one_line, prepared, same
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import prepare_data
import sample
import train
from model import IGNORE_INDEX, PRESETS, build, export_huggingface, load, save

transformers.utils.logging.disable_progress_bar()

V, T = 61, 24  # vocabulary and longest text of the tiny models
BERT_SIZES = dict(vocab_size=V, max_position_embeddings=T, hidden_size=12, num_hidden_layers=2,
                  num_attention_heads=2, intermediate_size=20)
LLAMA_SIZES = BERT_SIZES | dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2)
MODELS = {  # family: (the class that is meant where a test names only the family, its sizes)
    'gpt2': ('GPT2LMHeadModel', dict(vocab_size=V, n_positions=T, n_embd=12, n_layer=2, n_head=2)),
    'bert': ('BertForPreTraining', BERT_SIZES),
    't5': ('T5ForConditionalGeneration', dict(
        vocab_size=V, n_positions=T, d_model=12, d_kv=5, d_ff=20, num_layers=2, num_heads=2,
        decoder_start_token_id=0)),
    'llama': ('LlamaForCausalLM', LLAMA_SIZES),
    'mistral': ('MistralForCausalLM', LLAMA_SIZES | dict(sliding_window=5))}
some = lambda n: settings(max_examples=n, phases=[Phase.explicit, Phase.generate])  # no shrinking
every_family = pytest.mark.parametrize('family', MODELS)

def wide(model):
    """Random weights, none of them 0 or 1, so wide that no two logits are close to each other."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.5 if p.dim() < 2 else 0.0, 0.3)
    return model.eval()

def reference(family, name=None, **choices):
    """A tiny model of transformers."""
    cls = getattr(transformers, name or MODELS[family][0])
    ends = {'bos_token_id': None, 'eos_token_id': None}
    return wide(cls(cls.config_class(**{**MODELS[family][1], **ends, **choices})))

def put(folder, name, data):
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    (folder / name).write_text(text, encoding='utf-8')

def write(folder, about, tensors, name='model.safetensors'):
    put(folder, 'config.json', about)
    save_file({key: t.clone().contiguous() for key, t in tensors.items()}, folder / name)
    return folder

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """place() makes an empty folder, whose name is not ASCII."""
    return lambda: tmp_path_factory.mktemp('模型 e\u0301')

@pytest.fixture(scope='module')
def whole(place):
    """whole(family): config.json and tensors as transformers writes them, to be changed."""
    torch.manual_seed(0)
    made = {}
    for family in MODELS:
        folder = place()
        reference(family).save_pretrained(folder)
        made[family] = (json.loads((folder / 'config.json').read_text(encoding='utf-8')),
                        load_file(folder / 'model.safetensors'))
    return lambda family: tuple(map(dict, made[family]))

def refuses(path, *words, opens=load):
    """Opening a folder raises one line that has these words."""
    message = one_line((ValueError, OSError), opens, path)
    for word in words:
        assert word in message, f'{word} should stand in: {message}'

def ask(capsys, *flags):
    """What sample.py prints as JSON."""
    capsys.readouterr()
    sample.main([*map(str, flags), '--json', '--device', 'cpu'])
    return json.loads(capsys.readouterr().out)

# -----------------------------------------------------------------------------
# The same logits and the same loss, there and back

bools, few = st.booleans(), st.integers(1, 3)
rows = st.lists(st.integers(2, T), min_size=1, max_size=3)  # lengths, before they are padded
options = lambda **values: st.fixed_dictionaries({
    name: st.sampled_from(of) if isinstance(of, list) else of for name, of in values.items()})
ropes = st.one_of(options(rope_type=['default'], rope_theta=[100.0, 1e4, 5e5]),
    options(rope_type=['llama3'], rope_theta=[100.0, 1e4], factor=[2.0, 8.0], low_freq_factor=[1.0],
            high_freq_factor=[2.0, 4.0], original_max_position_embeddings=[8, 24, 200]))
CHOICES = {  # sizes of 12 make matrices square: a transposed one would load, and compute nonsense
    'gpt2': options(n_layer=few, n_head=[1, 2, 6], n_inner=[None, 12, 20],
                    activation_function=['gelu_new', 'gelu', 'relu'], scale_attn_weights=bools,
                    layer_norm_epsilon=[1e-5, 1e-2], tie_word_embeddings=bools),
    'bert': options(num_hidden_layers=few, num_attention_heads=[1, 2, 6], type_vocab_size=few,
                    intermediate_size=[12, 20], hidden_act=['gelu', 'gelu_new', 'relu'],
                    layer_norm_eps=[1e-12, 1e-2], tie_word_embeddings=bools),
    't5': options(num_layers=few, num_heads=few, d_kv=st.integers(3, 6), d_ff=[12, 20],
                  layer_norm_epsilon=[1e-6, 1e-2], tie_word_embeddings=bools,
                  feed_forward_proj=['relu', 'gelu', 'gated-gelu', 'gated-silu'],
                  relative_attention_num_buckets=[4, 9, 32],
                  relative_attention_max_distance=[18, 128]),
    'llama': options(num_hidden_layers=few, num_attention_heads=[6, 12], attention_bias=bools,
                     mlp_bias=bools, num_key_value_heads=[1, 2, 6], head_dim=[None, 2, 10],
                     hidden_act=['silu', 'gelu_pytorch_tanh'], rms_norm_eps=[1e-6, 1e-2],
                     tie_word_embeddings=bools, rope_parameters=ropes),
    'mistral': options(num_hidden_layers=few, num_key_value_heads=[1, 2, 6], head_dim=[None, 10],
                       sliding_window=[None, 1, 2, 7, T - 1, T, 4096], tie_word_embeddings=bools,
                       rope_parameters=ropes)}

logits_of = lambda out: out.get('logits', out.get('prediction_logits'))

def batch_of(family, lengths, segments):
    """(inputs of transformers, inputs of our model): the same ids, mask and targets."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids, B = torch.randint(V, mask.shape), len(lengths)
    theirs, ours = {'attention_mask': mask.long()}, {'attention_mask': mask}
    if family == 't5':
        theirs['labels'] = targets = torch.randint(V, (B, 7))
        targets[0, 4:] = IGNORE_INDEX  # the padding of a shorter target
        ours |= {'targets': targets, 'decoder_ids': F.pad(targets[:, :-1].clamp(min=0), (1, 0))}
    elif family == 'bert':
        targets = ids.masked_fill(~mask | (torch.rand(ids.shape) < 0.5), IGNORE_INDEX)
        targets[:, 1] = ids[:, 1]
        follows = torch.randint(2, (B,))
        theirs |= {'token_type_ids': torch.randint(segments, ids.shape), 'labels': targets,
                   'next_sentence_label': 1 - follows}  # class 0 is "is next" there
        ours |= {'segments': theirs['token_type_ids'], 'targets': targets, 'next_targets': follows}
    else:  # transformers shifts the labels of a decoder by itself
        theirs['labels'] = ids.masked_fill(~mask, IGNORE_INDEX)
        ours['targets'] = F.pad(theirs['labels'][:, 1:], (0, 1), value=IGNORE_INDEX)
    return {'input_ids': ids, **theirs}, {'ids': ids, **ours}

@every_family
@some(15)
@given(data=st.data(), lengths=rows)
@torch.no_grad()
def test_logits_and_loss_are_those_of_transformers_there_and_back(family, data, lengths, place):
    """A folder opens with the logits and loss it had, and its export is the same model again."""
    theirs, folder, back = reference(family, **data.draw(CHOICES[family])), place(), place()
    theirs.save_pretrained(folder)
    model, checkpoint = load(folder)
    assert checkpoint['not_read'] == []
    assert family != 'mistral' or model.config.window == str(theirs.config.sliding_window or 0)
    assert all(family == 'llama' and name.endswith('.bias') for name in checkpoint['new'])
    inputs, ours = batch_of(family, lengths, getattr(theirs.config, 'type_vocab_size', 1))
    expected, (logits, loss) = theirs(**inputs), model.eval()(**ours)
    right = logits_of(expected)
    if family == 'bert':  # only where a token has a target
        close(logits, right[ours['targets'] != IGNORE_INDEX], 1e-4)
    else:
        mask = slice(None) if family == 't5' else ours['attention_mask']
        close(logits[mask], right[mask], 1e-4)
    close(loss, expected.loss, 1e-4)
    export_huggingface(model, back, bos_token_id=3, decoder_start_token_id=0)
    again, info = type(theirs).from_pretrained(back, output_loading_info=True)
    assert not any(info.values()) and again.config.bos_token_id == 3, info
    same(logits_of(again.eval()(**inputs)), right)
    for ours, theirs in zip(load(back)[0].parameters(), model.parameters(), strict=True):
        same(ours, theirs)

LABELS = ['好评', '🙂', *(f'L{i}' for i in range(2, 11)), '']  # '10' must not stand before '2'
HEADS = {'nsp_head', 'transform', 'transform_norm', 'output'}
BERTS = {  # class: (task, weights that the folder lacks)
    'BertForMaskedLM': ('', {'pooler', 'nsp_head'}), 'BertModel': ('', HEADS),
    'BertForNextSentencePrediction': ('', HEADS - {'nsp_head'}),
    'BertForSequenceClassification': ('classify', HEADS),
    'BertForTokenClassification': ('tag', HEADS | {'pooler'}),
    'BertForQuestionAnswering': ('qa', HEADS | {'pooler'})}

@pytest.mark.parametrize('name', BERTS)
def test_every_head_of_bert_answers_as_in_transformers(name, place):
    """Labels keep their order, what the folder lacks is listed as new, and the export answers."""
    task, new = BERTS[name]
    labels = LABELS if task in ('classify', 'tag') else []
    named = {'id2label': dict(enumerate(labels)), 'label2id': {}} if labels else {}
    theirs, folder, back = reference('bert', name, **named), place(), place()
    theirs.save_pretrained(folder)
    model, checkpoint = load(folder / 'model.safetensors')  # any file of it will do
    assert checkpoint['labels'] == labels and model.config.task == task
    assert {key.removeprefix('trunk.').split('.')[0] for key in checkpoint['new']} == new
    inputs, ours = batch_of('bert', [9, 6, 2], 2)
    inputs = {key: t for key, t in inputs.items() if 'label' not in key}
    ours, mask = {key: t for key, t in ours.items() if 'target' not in key}, ours['attention_mask']
    real = {'classify': slice(None), 'qa': mask[:, None].expand(3, 2, 9)}.get(task, mask)
    def answers(theirs, model):
        with torch.no_grad():
            out, logits = theirs.eval()(**inputs), model.eval()(**ours)[0]
            if name == 'BertForNextSentencePrediction':
                is_next = model(**ours, next_targets=torch.zeros(3, dtype=torch.long))[0]
                return is_next.flip(1), out.logits
            if name == 'BertModel':
                return model.pool(model.hidden(**ours)), out.pooler_output
        if task == 'qa':
            return logits[real], torch.stack([out.start_logits, out.end_logits], dim=1)[real]
        return logits[real], out.logits[real]
    close(*answers(theirs, model), 1e-4)
    if task:
        model.config.n_labels += task == 'qa'  # ours may know questions without an answer
        export_huggingface(model, back, **named)
        again, info = type(theirs).from_pretrained(back, output_loading_info=True)
        close(*answers(again, load(back)[0]), 1e-4)
        assert not any(info.values()) and load(back)[1]['labels'] == labels, info
        export_huggingface(model, place() / 'x')  # without the names of its labels

EMBEDDINGS = {'gpt2': 'transformer.wte.weight', 'bert': 'bert.embeddings.word_embeddings.weight',
              't5': 'shared.weight', 'llama': 'model.embed_tokens.weight'}
COPIES = {  # tensors that older files hold besides: constants, and copies of tied weights
    'gpt2': {'h.0.attn.bias': (1, 1, T, T)}, 'bert': {'embeddings.position_ids': (1, T)},
    't5': {'encoder.embed_tokens.weight': (V, 12)},
    'llama': {'layers.0.self_attn.rotary_emb.inv_freq': (2,)}, 'mistral': {}}

HUB = {  # what config.json of well-known models says besides sizes
    'gpt2 renamed': {'activation_function': 'gelu_fast', 'num_attention_heads': 3,
                     'num_hidden_layers': 1, 'hidden_size': 24},
    'gpt2': {'activation_function': 'gelu_pytorch_tanh', 'n_ctx': 1024, '_num_labels': 1,
             'id2label': {'0': 'LABEL_0'}, 'n_special': 0, 'predict_special_tokens': True,
             'task_specific_params': {'text-generation': {}}},
    'bert': {'architectures': ['BertForPreTraining'], 'directionality': 'bidi', 'pooler_type':
             'first_token_transform', 'position_embedding_type': 'absolute'},
    't5': {'feed_forward_proj': 'gelu_new', 'architectures': ['T5WithLMHeadModel'],
           'output_past': True, 'is_encoder_decoder': True},
    't5 flan': {'dense_act_fn': 'gelu_new', 'feed_forward_proj': 'gated-gelu', 'is_gated_act': True,
                'tie_word_embeddings': False, 'classifier_dropout': 0.0},
    'llama 2': {'max_sequence_length': 2048, 'attention_bias': False, 'eos_token_id': [2, 3],
                'pretraining_tp': 1, 'rope_scaling': None, 'rope_theta': 100.0},
    'llama 3': {'mlp_bias': False, 'rope_theta': 500.0, 'rope_scaling': {
        'factor': 8.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0, 'rope_type': 'llama3',
        'original_max_position_embeddings': 16},
        'rope_parameters': {'rope_type': 'default', 'rope_theta': 9.0}},
    'llama smol': {'hidden_act': 'swish', 'is_llama_config': True, 'rope_interleaved': False,
        'rope_theta': 100000, 'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}}},
    'mistral 0.1': {'sliding_window': 4, 'author': 'somebody', 'created_date': '2021-04-28'}}

@pytest.mark.parametrize('name', HUB)
def test_well_known_configurations_and_old_files_open_with_their_logits(name, place, capsys):
    """Fields that describe are named in one line; float16, names of 2018 and copies are read."""
    family, folder = name.split()[0], place()
    about = {'model_type': family, **MODELS[family][1], **HUB[name]}
    theirs = getattr(transformers, MODELS[family][0])
    theirs = wide(theirs(theirs.config_class.from_dict(dict(about))))
    for p in theirs.parameters():
        p.data = p.data.half().float()
    theirs.save_pretrained(folder)
    tensors = {key: torch.zeros(shape) for key, shape in COPIES[family].items()}
    for key, t in load_file(folder / 'model.safetensors').items():
        key = re.sub(r'^(transformer|bert|model)\.', '', key)
        key = key.replace('LayerNorm.weight', 'LayerNorm.gamma')
        tensors[key.replace('LayerNorm.bias', 'LayerNorm.beta')] = t.half()
    write(folder, about, tensors)
    capsys.readouterr()
    model, checkpoint, _ = sample.open_model(folder)
    said = capsys.readouterr().err
    assert checkpoint['dropped'] == [*COPIES[family]] and not checkpoint['new']
    unknown = {'n_special', 'predict_special_tokens', 'max_sequence_length', 'author'}
    assert said.count('\n') == bool(unknown & HUB[name].keys())
    assert all(field in said for field in unknown & HUB[name].keys()), said
    inputs, ours = batch_of(family, [T, 9], 2)
    mask = slice(None) if family == 't5' else ours['attention_mask']
    with torch.no_grad():
        out = theirs(**inputs)
        logits = model.eval()(**{key: ours[key] for key in ours if 'targets' not in key})[0]
    close(logits[mask], logits_of(out)[mask], 1e-4)

@pytest.mark.parametrize('family', ['gpt2', 'bert', 't5', 'llama'])
def test_a_head_in_the_file_counts_although_the_fields_call_it_tied(family, whole, place):
    """As in transformers; and what generation_config.json asks for, and is not done, is named."""
    about, tensors = whole(family)
    head = 'cls.predictions.decoder.weight' if family == 'bert' else 'lm_head.weight'
    copy, other = tensors[EMBEDDINGS[family]], {'t5': 'decoder.embed_tokens.weight'}
    heads = [{head: copy}, {head: torch.randn(copy.shape)}, {other.get(family, head): copy}]
    heads += [heads[1] | heads[2]] * (family == 't5')  # both, as in MADLAD-400
    for i, found in enumerate(heads):  # from the third on without the table's usual name
        found = found | {name: t for name, t in tensors.items() if i < 2 or t is not copy}
        folder = write(place(), about | {'tie_word_embeddings': True}, found)
        put(folder, 'generation_config.json', {'repetition_penalty': 1.3, 'eos_token_id': None})
        theirs = getattr(transformers, MODELS[family][0]).from_pretrained(folder)
        (model, checkpoint), (inputs, ours) = load(folder), batch_of(family, [T], 2)
        assert checkpoint['not_read'] == ['repetition_penalty']
        with torch.no_grad():
            logits = model.eval()(**{key: ours[key] for key in ours if 'targets' not in key})[0]
            close(logits, logits_of(theirs(**inputs)), 1e-4)

# -----------------------------------------------------------------------------
# What is refused by name

REFUSED = {  # family: [(field, a value with an effect that is not computed here)]
    'gpt2': [('activation_function', 'silu'), ('add_cross_attention', True), ('model_type', None),
             ('scale_attn_by_inverse_layer_idx', True), ('attention_sinks', 4), ('n_layer', 0),
             ('architectures', ['GPT2ForTokenClassification']), ('n_layer', '2'),
             ('is_causal', False)],
    'bert': [('hidden_act', 'silu'), ('is_causal', True), ('is_decoder', True),
             ('problem_type', 'regression'), ('position_embedding_type', 'relative_key'),
             ('pruned_heads', {'0': [1]})],
    't5': [('feed_forward_proj', 'gated-relu'), ('num_decoder_layers', 3),
           ('architectures', ['T5ForTokenClassification'])],
    'llama': [('hidden_act', 'relu'), ('partial_rotary_factor', 0.5), ('model_type', 'gemma2'),
              ('rope_parameters', {'rope_type': 'dynamic'}), ('rope_scaling', {'type': 'yarn'}),
              ('quantization_config', {'bits': 4}), ('final_logit_softcapping', 30.0)],
    'mistral': [('layer_types', ['full_attention', 'sliding_attention']), ('num_local_experts', 8)]}

@pytest.mark.parametrize('family', REFUSED)
def test_a_field_that_is_not_computed_here_is_refused_by_name(family, whole, place):
    """A model that silently computes something else is worse than none; None is a missing key."""
    named = {'architectures': 'For', 'rope_parameters': 'rope_scaling'}
    for field, value in REFUSED[family]:
        about, tensors = whole(family)
        about[field] = value
        if value is None or field == 'rope_scaling':  # this is the old name of rope_parameters
            del about[field if value is None else 'rope_parameters']
        refuses(write(place(), about, tensors), named.get(field, field))

@every_family
@some(6)
@given(data=st.data())
def test_a_tensor_that_is_missing_unknown_or_misshapen_is_named(family, data, whole, place):
    """Every tensor of a file is accounted for; only a head that a BERT lacks is made new."""
    about, tensors = whole(family)
    name = data.draw(st.sampled_from(sorted(tensors)))
    short, t = re.sub(r'^(transformer|bert|model)\.', '', name), tensors[name]
    short = short.replace('c_attn', 'c_attn.q')  # GPT-2's q, k and v are one matrix
    lacking = write(place(), about, {other: t for other, t in tensors.items() if other != name})
    if short.startswith(('cls.', 'pooler.')):
        assert len(load(lacking)[1]['new']) == 1
    else:
        refuses(lacking, short)
    for other in (t[:-3], t[..., 3:], t[None]):
        refuses(write(place(), about, tensors | {name: other}), short.rpartition('.')[2])
    refuses(write(place(), about, tensors | {'größer': t}), 'größer')

def test_files_that_are_not_there_are_named(whole, place, monkeypatch):
    """A git-LFS pointer, pickled weights, a lone tokenizer.model: one line says what to fetch."""
    about, tensors = whole('gpt2')
    shards, names = place(), sorted(tensors)
    for i, part in enumerate((names[:3], names[3:]), start=1):
        write(shards, about, {name: tensors[name] for name in part},
              f'model-0000{i}-of-00002.safetensors')
    put(shards, 'model.safetensors.index.json', {'weight_map': {
        name: f'model-0000{1 + (name in names[3:])}-of-00002.safetensors' for name in names}})
    write(shards, about, {names[0]: tensors[names[0]] + 1}, 'model-00003-of-00003.safetensors')
    write(shards, about, {names[0]: tensors[names[0]] + 1}, 'model_other.safetensors')
    pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548118077\n'
    folder = write(place(), about, tensors)
    put(folder, 'tokenizer.json', pointer)
    refuses(folder, 'tokenizer.json is a git-LFS', opens=prepare_data.load_tokenizer)
    put(folder, 'model.safetensors', pointer)
    put(folder, 'model.safetensors.index.json', {'weight_map': {'x': 'old_model.safetensors'}})
    refuses(folder, 'model.safetensors is a git-LFS')
    (folder / 'model.safetensors').unlink()
    refuses(folder, 'there is no', 'model.safetensors')
    put(folder, 'pytorch_model.bin', '')
    refuses(folder, 'pytorch_model.bin', 'safetensors')
    (folder / 'model.safetensors.index.json').unlink()
    refuses(folder, 'pytorch_model.bin', 'safetensors')
    put(folder, 'pytorch_model.bin', pointer)
    refuses(folder, 'pytorch_model.bin is a git-LFS')
    (folder / 'tokenizer.json').rename(folder / 'tokenizer.model')
    refuses(folder, 'tokenizer.json', opens=prepare_data.load_tokenizer)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, allow_patterns: {
        'somebody/gpt2': shards}.get(name) if {'*.json', '*.txt'} < {*allow_patterns} else None)
    model, checkpoint = load('somebody/gpt2')  # files that the index does not name do not count
    assert checkpoint['new'] == []
    for a, b in zip(model.parameters(), load(write(place(), about, tensors))[0].parameters()):
        same(a, b)
    monkeypatch.undo()  # now the hub cannot be reached
    refuses('somebody/gpt2', 'https://huggingface.co/somebody/gpt2')
    put(folder := place(), 'config.json', about)
    put(folder, 'adapter_config.json', {})
    refuses(folder, 'is an adapter')
    refuses(folder / 'adapter_config.json', 'is an adapter')

@pytest.mark.parametrize('preset, changes, named', [
    ('nano', {}, 'norm_weight'), ('palm', {}, 'parallel'), ('transformer', {}, 'norm_first'),
    ('lstm', {}, 'arch'), ('gpt2', {'window': '5'}, 'window'), ('gpt2', {'n_kv_head': 2}, 'n_kv'),
    ('llama', {'window': '5 0'}, 'window'), ('t5', {'bias': True}, 'bias'),
    ('llama', {'qk_norm': True}, 'qk_n'), ('bert', {'segments': 0}, 'segm'), ('gpt2', {}, 'not e')])
def test_what_no_class_computes_is_not_exported(preset, changes, named, place):
    """The choice in the way is named, nothing is written, and a full folder stays as it is."""
    sizes = dict(vocab_size=V, block_size=T, n_layer=1, n_head=4, n_embd=16, head_dim=4, mlp_dim=24)
    model, folder = build(dataclasses.replace(PRESETS[preset], **sizes | changes)), place()
    put(folder, 'notes', '')
    out = folder / ('' if named == 'not e' else 'new')
    assert named in one_line(ValueError, export_huggingface, model, out)
    assert os.listdir(folder) == ['notes']

# -----------------------------------------------------------------------------
# Folders with a tokenizer

LINES = ['The cat sat on the mat. It is the end of the tale.', '床前明月光，疑是地上霜。',
         "Café déjà vu, it's 10 o'clock!", 'the dog and the cat: who won? The dog won.']
WORDS = ['the', 'The', 'CATS', 'Café', 'cafe\u0301', 'İ', '床前', '明月', '👋🏽', '❤\ufe0f', "it's",
         'ﬁ', ' ', '  ', '\n', '\t', '\u3000', '.', '，', '\u200d', '<|endoftext|>', '[SEP]', '<s>']
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=10).map(''.join)
LETTERS = sorted({*''.join(LINES).lower(), *'abcdefghijklmnopqrstuvwxyz'} - {' '})

def put_tokenizer(folder, tokenizer, template, **names):
    """tokenizer.json and tokenizer_config.json; its special tokens come first."""
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single=template, special_tokens=[('<begin>', 1), ('</s>', 2)])
    tokenizer.enable_truncation(3)  # what a file may hold besides
    tokenizer.enable_padding(direction='left', length=5)
    put(folder, 'tokenizer.json', tokenizer.to_str())
    put(folder, 'tokenizer_config.json', {'tokenizer_class': 'PreTrainedTokenizerFast', **names,
                                          'eos_token': '</s>', 'unk_token': '<unk>'})

def write_gpt2(folder):
    tokenizer = hf.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(LINES * 3, 300, show_progress=False,
                                  special_tokens=['<|endoftext|>'])
    tokenizer.save_model(str(folder))

def write_bert(folder):
    put(folder, 'vocab.txt', '\n'.join([
        '[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *LETTERS, *(f'##{c}' for c in LETTERS),
        'the', 'cat', 'dog', 'won', 'cafe', '##he', '床前', 'T', 'C', '##A', '##T']) + '\n')

def write_t5(folder):
    """SentencePiece as T5 has it, with the sentinels last."""
    pieces = ['<unk>', '<pad>', '</s>', '▁', '▁the', 's', '▁cat', '▁dog', '明月', *LETTERS]
    scores = [-10.916955071618881 - i / 4 for i in range(len(pieces))]
    tokenizer = hf.Tokenizer(hf.models.Unigram([*zip(pieces, scores)], unk_id=0))
    tokenizer.normalizer = hf.normalizers.NFKC()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    tokenizer.decoder = hf.decoders.Metaspace()
    tokenizer.add_special_tokens([*pieces[:3], *(f'<extra_id_{i}>' for i in range(99, -1, -1))])
    put_tokenizer(folder, tokenizer, '$A </s>', pad_token='<pad>')

def write_llama(folder):
    """SentencePiece as Llama has it: <begin> begins a text, and unknown characters become bytes."""
    merges = [('t', 'h'), ('th', 'e'), ('▁', 'the'), ('a', 't'), ('c', 'at'), ('明', '月')]
    tokens = ['<unk>', '<begin>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), '▁', *LETTERS,
              *(a + b for a, b in merges)]
    tokenizer = hf.Tokenizer(hf.models.BPE({text: i for i, text in enumerate(tokens)}, merges,
                                           unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = hf.normalizers.Sequence([
        hf.normalizers.Prepend('▁'), hf.normalizers.Replace(' ', '▁')])
    tokenizer.decoder = hf.decoders.Sequence([hf.decoders.Replace('▁', ' '),
        hf.decoders.ByteFallback(), hf.decoders.Fuse(), hf.decoders.Strip(' ', 1, 0)])
    tokenizer.add_special_tokens([hf.AddedToken(token, normalized=True) for token in tokens[:3]])
    put_tokenizer(folder, tokenizer, '<begin> $A', bos_token='<begin>')

WRITE = {'gpt2': write_gpt2, 'bert': write_bert, 't5': write_t5, 'llama': write_llama}
@pytest.fixture(scope='module')
def folders(place):
    """{name: a folder with tokenizer and model}; the table of a model has rows without a token."""
    torch.manual_seed(0)
    found = {}
    for family, fill in WRITE.items():
        folder = found[family] = place()
        fill(folder)
        put(folder, 'config.json', {'model_type': family})
        head = 'BertForMaskedLM' if family == 'bert' else None
        length = 'n_positions' if family in ('gpt2', 't5') else 'max_position_embeddings'
        model = reference(family, head, **{
            'vocab_size': prepare_data.load_tokenizer(folder).n_vocab + 3, length: 96})
        if family == 'llama':  # no text of single bytes, which are no characters
            model.lm_head.weight.data[3:259] = 0
        model.save_pretrained(folder)
    for family, name in (('gpt2', 'vocab.json'), ('bert', 'vocab.txt')):
        folder = shutil.copytree(found[family], place() / 'copy')
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        (folder / name).unlink()
        found[f'{family} tokenizer.json'] = folder
    found['bert cased'] = shutil.copytree(found['bert'], place() / 'copy')
    put(found['bert cased'], 'tokenizer_config.json', {
        'do_lower_case': False, 'tokenize_chinese_chars': False})
    return found

@pytest.mark.parametrize('name', [
    *WRITE, 'gpt2 tokenizer.json', 'bert tokenizer.json', 'bert cased'])
def test_ids_offsets_and_text_are_those_of_transformers(name, folders, place):
    """For any text; special tokens that are written in it are text."""
    ours = prepare_data.load_tokenizer(folders[name])
    theirs = transformers.AutoTokenizer.from_pretrained(folders[name])
    @some(40)
    @given(texts)
    @example('  The Café 床前 cats 👋🏽\n\ne\u0301 ﬁ')
    def check(text):
        assume(not any(token in text for token in theirs.all_special_tokens))
        right = theirs(text, add_special_tokens=False, return_offsets_mapping=True,
                       split_special_tokens=True)
        ids, offsets = ours.encode_with_offsets(text)
        assert ids.tolist() == right['input_ids'] == ours.encode(text).tolist(), text
        assert [tuple(pair) for pair in offsets.tolist()] == right['offset_mapping'], text
        assert ours.decode(ids) == theirs.decode(right['input_ids']), text
    check()
    written = ours.encode('the <s> cat</s> [SEP] <|endoftext|> <pad>[MASK] <extra_id_0>').tolist()
    unknown = theirs.unk_token_id if 'gpt2' not in name else None
    assert not {*written} & ({*theirs.all_special_ids, *ours.special.values()} - {unknown})
    assert name != 'gpt2' or ours.unknown is None
    if name == 'bert':  # WordPiece drops this character
        with pytest.raises(ValueError, match='no token for the answer'):
            prepare_data.TASKS['qa'].examples(ours, {
                'question': 'cat', 'context': 'the \u200b', 'answers': [(4, '\u200b')]}, [], 32)
        [made] = prepare_data.TASKS['qa'].examples(ours, {
            'question': 'cat', 'context': 'the cafe\u0301'}, [], 32)
        assert made['meta']['offsets'][-1][1] == 9, 'the accent that it drops is lost'
        chinese = shutil.copytree(folders[name], place() / 'copy')
        put(chinese, 'config.json', {'model_type': 'gpt2', 'tokenizer_class': 'BertTokenizer'})
        assert prepare_data.load_tokenizer(chinese).start_id == theirs.cls_token_id != ours.start_id

def test_a_class_of_another_kind_than_tokenizer_json_does_not_count(folders, place):
    """As of multilingual MiniLM; by the class, transformers 5 finds no word."""
    folder = shutil.copytree(folders['t5'], place() / 'copy')
    about = json.loads((folder / 'tokenizer_config.json').read_text())
    put(folder, 'tokenizer_config.json', about | {'tokenizer_class': 'BertTokenizer'})
    put(folder, 'config.json', {'model_type': 'bert'})
    ours, right = map(prepare_data.load_tokenizer, (folder, folders['t5']))
    assert ours.encode('the cat').tolist() == right.encode('the cat').tolist()

def test_added_tokens_are_words_unless_they_have_a_role_or_no_row(folders, place):
    """Roles of a chat and markers of entities are read as in transformers, and may be written."""
    folder = shutil.copytree(folders['gpt2 tokenizer.json'], place() / 'copy')
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({'additional_special_tokens': ['<|user|>']})
    theirs.add_special_tokens({'pad_token': '[PAD]', 'bos_token': '<|bos|>'})
    theirs.save_pretrained(folder)
    user, pad, bos = theirs.convert_tokens_to_ids(['<|user|>', '[PAD]', '<|bos|>'])
    for rows, pad_id in ((len(theirs), pad), (min(pad, bos), theirs.eos_token_id)):
        about = json.loads((folder / 'config.json').read_text()) | {'vocab_size': rows}
        put(folder, 'config.json', about)
        ours = prepare_data.load_tokenizer(folder)
        assert ours.pad_id == pad_id and user not in ours.special.values()
        text = 'the<|user|> cat'
        assert ours.encode(text).tolist() == theirs(text)['input_ids']
        assert user in ours.encode(text) and pad not in ours.encode('[PAD]')
        again = prepare_data.Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
        assert again.encode(text).tolist() == ours.encode(text).tolist()
        exported, ids = ours.export_files(rows, 'gpt')['tokenizer.json'], theirs(text)['input_ids']
        assert (pad < rows) == (pad in [token['id'] for token in exported['added_tokens']])
        named = ours.export_files(rows, 'gpt')['tokenizer_config.json'].get('bos_token')
        assert (named, ours.start_id) == (('<|bos|>', bos) if bos < rows else (None, pad_id))
        shown = hf.Tokenizer.from_str(json.dumps(exported)).decode(ids)
        assert shown == theirs.decode(ids, skip_special_tokens=True)

def special_ids(theirs, size):
    """Ids that are no text: special tokens, and rows without a token."""
    added = [i for i, token in theirs.added_tokens_decoder.items() if token.special]
    return {*theirs.all_special_ids, *added, *range(max(theirs.get_vocab().values()) + 1, size)}

def new_ids(model, theirs, ids, ends, **more):
    """What transformers' generate() writes, without its end."""
    hidden = sorted(special_ids(theirs, model.config.vocab_size) - ends)
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0,
                         suppress_tokens=hidden, eos_token_id=sorted(ends) or None, **more)
    new = out[0, 1 if model.config.is_encoder_decoder else len(ids):].tolist()
    return new[:next((n for n, i in enumerate(new) if i in ends), len(new))]

@pytest.mark.parametrize('family', ['gpt2', 'llama', 't5'])
@some(8)
@given(data=st.data())
def test_greedy_text_is_that_of_generate(family, data, folders, place, capsys):
    """It ends, and T5's begins, at the tokens that the three files name; null names none."""
    folder = shutil.copytree(folders[family], place() / 'copy')
    if family == 'llama' and data.draw(bools):  # tokenizer.json alone says what begins a text
        put(folder, 'tokenizer_config.json', {'tokenizer_class': 'PreTrainedTokenizerFast',
                                              'eos_token': '</s>'})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, MODELS[family][0]).from_pretrained(folder)
    words = st.lists(st.sampled_from([w for w in WORDS if w.strip()]), min_size=1, max_size=4)
    longer = data.draw(st.sampled_from([1, 40])) if family == 't5' else 1  # beyond n_positions
    prompt = ' '.join(data.draw(words) * longer)
    ids = theirs(prompt, split_special_tokens=True)['input_ids']
    start = data.draw(st.sampled_from([None, 0, 5, 9]))
    more = {'decoder_start_token_id': start or 0} if family == 't5' else {}
    ends = {theirs.eos_token_id}
    longest = new_ids(model, theirs, ids, ends, **more)
    for name, begin in (('generation_config.json', start), ('config.json', 0)):
        end = data.draw(st.sampled_from([None, *longest[2:]]))
        named = {'eos_token_id': end and data.draw(st.sampled_from([end, [end]])),
                 'decoder_start_token_id': begin}
        put(folder, name, json.loads((folder / name).read_text()) | named)
        ends |= {end} - {None}
    new = new_ids(model, theirs, ids, ends, **more)
    found = ask(capsys, '--init_from', folder, f'--start={prompt}', '--max_new_tokens', 12,
                '--temperature', 0)
    before = ids * (family != 't5')
    text = found['targets'][0]['text'] if family == 't5' else found['text']
    right = theirs.decode(before + new)[len(theirs.decode(before)):]
    assert text == right or (family == 't5' and text.strip() == right.strip())

def test_masks_are_filled_with_what_transformers_finds_likeliest(folders, place, capsys):
    """The five best of each [MASK] with their probabilities; no answer by weights not there."""
    theirs = transformers.AutoTokenizer.from_pretrained(folders['bert'])
    model = transformers.BertForMaskedLM.from_pretrained(folders['bert'])
    for start in ('The [MASK] sat on [MASK].', '床 ||| the [MASK]'):
        inputs = theirs(*start.split(' ||| '), return_tensors='pt')
        with torch.no_grad():
            logits = model(**inputs).logits[0][inputs['input_ids'][0] == theirs.mask_token_id]
        logits[:, sorted(special_ids(theirs, logits.size(1)))] = -torch.inf
        p, best = logits.softmax(dim=-1).topk(5)
        found = ask(capsys, '--init_from', folders['bert'], '--start', start)['guesses']
        for row, ids, values in zip(found, best, p, strict=True):
            assert [text for text, _ in row] == [theirs.decode([i]) for i in ids]
            close(torch.tensor([value for _, value in row]), values)
    for name, lost in (('MaskedLM', 'transform.dense'), ('SequenceClassification', 'pooler')):
        there = getattr(transformers, f'BertFor{name}').from_pretrained(folders['bert'])
        write(folder := shutil.copytree(folders['bert'], place() / 'copy'),
              there.config.to_dict() | {'architectures': [f'BertFor{name}']},
              {k: t for k, t in there.state_dict().items() if lost not in k})
        for flags in (['--start', 'the [MASK]'], ['--export', str(folder / 'new')]):
            with pytest.raises(ValueError, match='has no output'):
                sample.main(['--init_from', str(folder), *flags])

@pytest.fixture(scope='session')
def tiny(shared, tmp_path_factory):
    """The folders t-... of shared/tools/tiny_folders.py."""
    folder = tmp_path_factory.mktemp('tiny')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path(str(shared / 'tools' / 'tiny_folders.py'))
    return folder

def test_the_end_of_a_folder_is_the_one_that_its_files_name(tiny, folders, place, capsys):
    """Added tokens, an end that is not called <|endoftext|>, and several ends."""
    for name, ends in {'added': [257], 'eos': [257], 'named': [256], 'llama': [257, 258]}.items():
        assert sorted(prepare_data.load_tokenizer(tiny / f't-{name}').end_ids) == ends
        found = ask(capsys, '--init_from', tiny / f't-{name}', '--start=Hi', '--temperature', 0)
        assert name == 'named' or found == {'prompt': 'Hi', 'text': ''}
    sample.main(['--init_from', str(tiny / 't-llama'), '--export', str(new := place() / 'new')])
    assert json.loads((new / 'config.json').read_text())['eos_token_id'] == [257, 258]
    about = json.loads((tiny / 't-author/config.json').read_text())
    put(tiny / 't-author', 'config.json', about | {'eos_token_id': 999})  # of no tokenizer
    assert 999 in prepare_data.load_tokenizer(tiny / 't-author').end_ids
    alone = place()  # a tokenizer.json without a word of what its tokens are for
    shutil.copy(folders['gpt2 tokenizer.json'] / 'tokenizer.json', alone)
    assert prepare_data.load_tokenizer(alone).end_ids == [
        prepare_data.load_tokenizer(folders['gpt2']).end_id]
    words = hf.Tokenizer(hf.models.WordLevel({'<unk>': 0, 'cat': 1, '.': 2}, unk_token='<unk>'))
    words.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    put(folder := place(), 'tokenizer.json', json.loads(words.to_str()))
    put(folder, 'tokenizer_config.json', {'tokenizer_class': 'PreTrainedTokenizerFast'})
    put(folder, 'config.json', {'model_type': 'llama', 'eos_token_id': 2})  # the full stop
    ours = prepare_data.load_tokenizer(folder)
    assert ours.encode('cat . cat').tolist() == [1, 2, 1]
    assert 'eos_token' not in ours.export_files(3, 'gpt')['tokenizer_config.json']
    llama = prepare_data.load_tokenizer(folders['llama']).export_files(999, 'gpt')
    assert llama['tokenizer_config.json']['eos_token'] == '</s>'  # although it is normalized

def test_a_folder_that_means_something_else_is_refused(tiny):
    """Weights that are not finite, a regression, another tokenizer class, pickled shards."""
    for name, words in {'nan': 'fc.weight holds NaN', 'regression': 'regression',
                        'japanese': 'BertJapaneseTokenizer', 'shards': '.bin'}.items():
        refuses(tiny / f't-{name}', words, opens=sample.open_model)

@some(60)
@given(data=st.data())
def test_a_damaged_file_is_one_line_never_a_traceback(data, folders, place):
    """Bytes flipped or cut off in any file of a folder: it opens, or says in one line why not."""
    source = folders[data.draw(st.sampled_from(sorted(folders)))]
    name = data.draw(st.sampled_from(sorted(os.listdir(source))))
    folder = shutil.copytree(source, place() / 'copy')
    damaged = bytearray((folder / name).read_bytes())
    at = data.draw(st.integers(0, min(len(damaged), 3000) - 1))
    if data.draw(bools):
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del damaged[at:]
    (folder / name).write_bytes(damaged)
    try:
        sample.open_model(folder)
    except (ValueError, OSError) as e:
        assert str(e) and '\n' not in str(e), f'{name} at {at}: {e!r}'

# -----------------------------------------------------------------------------
# Out by command, and fine-tuning

BPE, BYTE = prepare_data.bpe_tokenizer(LINES * 3, 420), prepare_data.byte_tokenizer()

@pytest.mark.parametrize('preset, tokenizer, auto', [
    ('gpt2', BPE, 'AutoModelForCausalLM'), ('llama', BYTE, 'AutoModelForCausalLM'),
    ('t5', BPE, 'AutoModelForSeq2SeqLM'), ('bert', BPE, 'AutoModelForPreTraining'),
    ('bert', BYTE, 'AutoModelForPreTraining')])
def test_an_exported_folder_is_the_same_in_transformers(preset, tokenizer, auto, place, capsys):
    """AutoModel and AutoTokenizer give the same ids, logits and text; load() the same bits."""
    out, folder = place(), place() / 'new'
    model = wide(build(dataclasses.replace(PRESETS[preset], vocab_size=tokenizer.n_vocab,
        block_size=32, n_layer=2, n_head=2, n_embd=16, head_dim=8, mlp_dim=24)))
    save(out / 'ckpt.pt', model, tokenizer=tokenizer.to_dict(), task='', labels=[])
    sample.main(['--out_dir', str(out), '--export', str(folder)])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    there, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    back, checkpoint, again = sample.open_model(folder)
    path = place() / 'a.pt'
    save(path, back, **checkpoint)  # a file of ours: it opens without the folder
    assert sample.open_model(path)[2].to_dict() == again.to_dict()
    for text in [*LINES, '  the\n\ncat 床👋', '']:
        ids = theirs(text, add_special_tokens=False)['input_ids']
        assert ids == tokenizer.encode(text).tolist() == again.encode(text).tolist()
        assert theirs.decode(ids) == text == again.decode(ids)
    assert theirs.pad_token_id == there.config.pad_token_id == tokenizer.pad_id
    assert theirs.eos_token_id == there.config.eos_token_id == again.end_id == tokenizer.end_id
    assert theirs.padding_side == ('left' if 'Causal' in auto else 'right')
    assert theirs.model_max_length == 32
    assert preset != 't5' or there.config.decoder_start_token_id == tokenizer.start_id
    assert again.special.items() >= tokenizer.special.items()
    for name, p in model.state_dict().items():
        same(back.state_dict()[name], p)
    a, b = tokenizer.encode('the cat').tolist(), tokenizer.encode('床').tolist()
    end = [tokenizer.end_id] * (preset == 't5')
    if preset == 'bert':  # framed as it was trained
        framed = prepare_data.add_special_tokens(tokenizer, a, b)
        found = theirs('the cat', '床')
        assert (found['input_ids'], found['token_type_ids']) == framed
        for ours in (tokenizer, again):  # of bytes, the space before [MASK] is not hidden
            [masked] = sample.examples_of(ours, 'masks', 'the [MASK] cat', 32)
            assert theirs('the [MASK] cat')['input_ids'] == masked['ids']
        for task in ('classify', 'tag', 'qa'):  # a tag or an answer may begin at any CJK character
            saved = tokenizer.export_files(tokenizer.n_vocab, 'bert', task)['tokenizer.json']
            right = tokenizer.encode(LINES[1]), tokenizer.encode_with_offsets(LINES[1])[0]
            found = hf.Tokenizer.from_str(json.dumps(saved)).encode(LINES[1], None, False, False)
            assert found.ids == right[task != 'classify'].tolist()
            assert len(right[0]) < len(right[1]) or tokenizer is BYTE
        return
    assert theirs('the cat')['input_ids'] == a + end
    found = ask(capsys, '--out_dir', out, '--start', 'the cat', '--max_new_tokens', 12,
                '--temperature', 0)
    right = theirs.decode(new_ids(there, theirs, a + end, {tokenizer.end_id}))
    text = found['targets'][0]['text'] if preset == 't5' else found['text']
    assert text.strip() == right.strip()

def test_a_llama_learns_the_begin_that_it_is_asked_with(folders, tmp_path):
    """Each document begins with it, once, and the source of a completion."""
    folder = prepared(tmp_path / 'd', 'the\n<|endoftext|>\n' * 3, tokenizer=str(folders['llama']))
    tokenizer = prepare_data.load_tokenizer(folder)
    [asked] = sample.examples_of(tokenizer, 'text', 'the\n', 9)
    tokens = train.Data(folder, 'val').tokens
    assert tokens.tolist() == 3 * [*asked['ids'], tokenizer.end_id]
    assert tokenizer.text_of(tokens).tolist() == 3 * asked['ids'][1:]
    [made] = prepare_data.seq2seq_examples(tokenizer, {'source': 'the\n'}, [], 32)
    assert made['ids'] == [*asked['ids'], tokenizer.end_id] and asked['ids'][0] == 1  # <begin>

def test_the_frame_of_a_source_is_that_of_its_tokenizer(place):
    """CodeT5 is a T5 with the tokenizer of a RoBERTa: <s> text </s>."""
    folder, specials = place(), ['<pad>', '<s>', '</s>', '<unk>']
    engine = hf.ByteLevelBPETokenizer()
    engine.train_from_iterator(LINES, 300, show_progress=False, special_tokens=specials)
    engine.save_model(str(folder))
    put(folder, 'config.json', {'model_type': 't5', 'decoder_start_token_id': 0})
    put(folder, 'tokenizer_config.json', {'tokenizer_class': 'RobertaTokenizer', 'bos_token': '<s>',
                                          'eos_token': '</s>', 'pad_token': '<pad>'})
    ours = prepare_data.Tokenizer.from_dict(prepare_data.load_tokenizer(folder).to_dict())
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    [example] = prepare_data.seq2seq_examples(ours, {'source': 'the 床', 'target': 'the'}, [], 32)
    assert example['ids'] == theirs('the 床')['input_ids']
    assert example['decoder_ids'] == [0, *example['targets'][:-1]]
    assert example['targets'] == theirs('the')['input_ids'][1:]
    files = ours.export_files(ours.n_vocab, 'bert')  # a BERT has learned from our own frame
    found = hf.Tokenizer.from_str(json.dumps(files['tokenizer.json'])).encode('the', '床')
    texts = [ours.encode(text).tolist() for text in ('the', '床')]
    assert (found.ids, found.type_ids) == prepare_data.add_special_tokens(ours, *texts)
    (folder / 'tokenizer_config.json').unlink()  # T5's class finds none of its files
    with pytest.raises(ValueError, match=r'finds no vocabulary.* name its tokenizer_class'):
        prepare_data.load_tokenizer(folder)

@pytest.mark.parametrize('name', ['gpt2', 'bert', 't5', 'llama', ''])
def test_an_exported_gpt_reads_there_what_it_read_here(folders, name):
    """A prompt without an end behind it, though tokenizers of BERT and T5 add one; a source."""
    ours = prepare_data.load_tokenizer(folders[name]) if name else BPE
    for kind, end in (('text', []), ('seq2seq', [ours.id('[SEP]')])):
        saved = ours.export_files(ours.n_vocab, 'gpt', kind)['tokenizer.json']
        found = hf.Tokenizer.from_str(json.dumps(saved)).encode('the cat')
        assert found.ids == [*ours.source_ids, *ours.encode('the cat').tolist(), *end]
        if kind == 'text' and name in ('gpt2', 'llama'):  # data prepared with it are still its own
            assert saved['post_processor'] == json.loads(ours.saved)['post_processor']

@pytest.mark.parametrize('labels', [[], ['no answer']])
def test_an_export_says_whether_questions_may_have_no_answer(place, labels):
    config = dataclasses.replace(PRESETS['bert'], n_layer=1, vocab_size=420, task='qa', n_labels=2)
    folder = place() / 'new'
    sample.export(build(config), BPE, labels, folder, 'qa')
    assert load(folder)[1]['labels'] == labels

def test_an_export_is_written_whole_or_not_at_all(place, monkeypatch):
    model, folder = build(dataclasses.replace(PRESETS['gpt2'], n_layer=1, vocab_size=420)), place()
    monkeypatch.delattr(sample, 'write_json')
    with pytest.raises(NameError):
        sample.export(model, BPE, [], folder / 'new')
    assert not [*folder.iterdir()]
    monkeypatch.undo()
    sample.export(model, BPE, [], folder / 'new', block_size=9)
    assert prepare_data.read_any(folder / 'new', 'tokenizer_config.json')['model_max_length'] == 9
    assert prepare_data.read_any(folder / 'new', 'generation_config.json')['max_new_tokens'] == 64
    with pytest.raises(ValueError, match='new is not empty'):
        sample.export(model, BPE, [], folder / 'new')

def test_a_bert_folder_is_tuned_exported_and_asked_by_command(folders, tmp_path, capsys):
    """prepare_data.py, train.py and sample.py: tokenizer and labels go all the way."""
    put(tmp_path, 'rows.tsv', ''.join(f'yes\tthe cat {i}\n不\t床前龘\n' for i in range(12)))
    said = command('prepare_data.py', '--task', 'classify', '--input', 'rows.tsv', '--tokenizer',
                   folders['bert'], '--out_dir', 'rows', '--block_size', 48, cwd=tmp_path)
    assert re.search(r'train: \d+ of \d+ tokens are unknown to the tokenizer', str(said))
    command('train.py', '--init_from', folders['bert'], '--dataset', 'rows', '--max_iters', 9,
            '--eval_interval', 9, '--batch_size', 8, '--device', 'cpu', cwd=tmp_path)
    command('sample.py', '--export', 'new', cwd=tmp_path)
    found = ask(capsys, '--init_from', new := tmp_path / 'new', '--start', 'the cat')
    assert len({str(prepare_data.load_tokenizer(f).to_dict()) for f in (folders['bert'], new)}) == 1
    lacking = shutil.copytree(new, tmp_path / 'lacking')
    save_file({name: t for name, t in load_file(new / 'model.safetensors').items()
               if 'pooler' not in name}, lacking / 'model.safetensors', {'format': 'pt'})
    flags = {'init_from': str(lacking), 'dataset': str(tmp_path / 'rows'), 'device': 'cpu'}
    first, again = (train.start(flags)[0].state_dict() for _ in range(2))
    assert all(t.equal(again[name]) for name, t in first.items())  # in each process, too
    with pytest.raises(ValueError, match=r'random \(trunk.pooler.weight'):
        train.start(flags | {'eval_only': True})
    train.start(flags | {'eval_only': True, 'init_from': str(new)})  # lacks what it never reads
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(new)
    assert auto.config.label2id == {label: i for i, label in auto.config.id2label.items()}
    theirs = transformers.AutoTokenizer.from_pretrained(new)
    assert (theirs.unk_token, theirs.mask_token) == ('[UNK]', '[MASK]')
    p = auto(**theirs('the cat', return_tensors='pt')).logits[0].softmax(dim=-1)
    assert found['label'] == auto.config.id2label[p.argmax().item()] in ('yes', '不')
    assert abs(found['probability'] - p.max().item()) < 1e-4
    put(new, 'tokenizer_config.json', {'tokenizer_class': 'BertTokenizer', 'model_max_length': 4})
    assert ask(capsys, '--init_from', new, '--start', 'the cat cat cat')['probabilities'] == (
        found['probabilities'])  # cut as there

def test_a_t5_folder_is_tuned_by_command(folders, tmp_path):
    """Its scores change in the last digit each time `tokenizers` reads them, and it is the same."""
    put(tmp_path, 'rows.tsv', 'the cat\tthe\ncat\tcat\n' * 9)
    folder = shutil.copytree(folders['t5'], tmp_path / 'copy')
    about = json.loads((folder / 'tokenizer_config.json').read_text())
    put(folder, 'tokenizer_config.json', about | {'tokenizer_class': 'T5Tokenizer'})
    command('prepare_data.py', '--task', 'seq2seq', '--input', 'rows.tsv', '--tokenizer',
            folder, '--out_dir', 'rows', cwd=tmp_path)
    command('train.py', '--init_from', folder, '--dataset', 'rows', '--max_iters', 2,
            '--device', 'cpu', cwd=tmp_path)
    command('sample.py', '--start', 'the cat', cwd=tmp_path)

def test_rows_added_to_gpt2_are_never_sampled_and_never_exported(shared, tmp_path, monkeypatch):
    """[SEP] and its like are rows behind GPT-2's own, which stay as they were."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(shared / 'tiktoken_cache'))
    gpt2, tokenizer = reference('gpt2', vocab_size=50257, n_embd=4), prepare_data.gpt2_tokenizer()
    gpt2.save_pretrained(tmp_path / 'gpt2')
    model, _ = load(tmp_path / 'gpt2', vocab_size=tokenizer.n_vocab)
    suppressed = sample.suppressed_tokens(model, tokenizer)
    assert suppressed[50257:].all() and len(suppressed) > 50257 and not suppressed[:50257].any()
    for task, rows in (('seq2seq', tokenizer.n_vocab), ('', 50257)):  # one answers behind [SEP]
        save(tmp_path / 'ckpt.pt', model, tokenizer=tokenizer.to_dict(), task=task, labels=[])
        sample.main(['--out_dir', str(tmp_path), '--export', new := str(tmp_path / f'new{task}')])
        assert len(transformers.AutoTokenizer.from_pretrained(new)) == rows
    back = transformers.AutoModelForCausalLM.from_pretrained(new)
    assert back.config.pad_token_id is None  # it would have no row
    same(back.transformer.wte.weight, gpt2.transformer.wte.weight)
