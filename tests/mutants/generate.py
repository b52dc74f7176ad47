"""
Change one small thing of the project at a time, anything at all, and see that the tests notice.

    python tests/mutants/generate.py --n 200               so many changes, drawn with --seed 0
    python tests/mutants/generate.py --n 200 choose        those of them whose name contains one of the words
    python tests/mutants/generate.py --n 200 --list        only say which

A change swaps an operator, adds or takes 1, turns True and False, min and max, drops a `not`, a border of a slice or a
statement, or swaps two arguments; never in a docstring, an annotation or a message. Tests that mention the changed function
run first, then all of its file. mutation.md has the results.
"""

import argparse
import ast
import copy
import random
import re
import sys

import run

SCOPE = {  # what is changed, of classes all methods; of model.py all but the tables for Hugging Face
    'model.py': None,
    'train.py': ['causal_lm', 'sentence_pairs', 'masked_lm', 'completion', 'span_corruption', 'get_batch', 'Optimizer',
                 'restore', 'train', 'find_origin', 'from_checkpoint', 'set_aside'],
    'sample.py': ['choose', 'generate', 'pick_rows', 'beam_search', 'TextStream', 'forbidden_tokens', 'entities', 'ratio',
                  'f1', 'label_scores', 'entity_scores', 'answer_words', 'answer_scores', 'grams', 'bleu_words', 'bleu',
                  'rouge_words', 'rouge', 'text_to_text_scores', 'text_loss', 'text_scores'],
}
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
         ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And}
DROPPED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.If, ast.For, ast.Continue, ast.Break, ast.Delete)


def changes(node):
    """What can be made of one node: pieces of source, each to stand in its place."""
    def new(**fields):
        return f'({ast.unparse(ast.copy_location(type(node)(**(dict(ast.iter_fields(node)) | fields)), node))})'

    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield new(op=SWAPS[type(node.op)]())
    if isinstance(node, ast.Compare):
        yield new(ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield from (f'({node.value + by!r})' for by in (1, -1))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert)):
        yield f'({ast.unparse(node.operand)})'
    if isinstance(node, ast.Call) and len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
        yield new(args=[node.args[1], node.args[0], *node.args[2:]])
    if isinstance(node, ast.Name) and node.id in ('min', 'max'):
        yield {'min': 'max', 'max': 'min'}[node.id]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        for border in ('lower', 'upper'):
            if getattr(node.slice, border):
                cut = copy.copy(node.slice)
                setattr(cut, border, None)
                yield new(slice=cut)[1:-1]
    if isinstance(node, DROPPED) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        yield 'pass'


def parts(node):
    """A node and all below it that may be changed."""
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in ('annotation', 'decorator_list') and not isinstance(
                    child, ast.JoinedStr) and not (isinstance(node, ast.Raise) and name in ('exc', 'cause')):
                yield from parts(child)


def mutants_of(file):
    """[(name, what, change, stages)] of all changes to one file."""
    path = run.ROOT / file
    source, found = path.read_bytes(), []
    lines = source.splitlines(keepends=True)
    place = lambda line, column: sum(map(len, lines[:line - 1])) + column
    tests = {test[1]: test[0] for name in run.tests_of([file])[:1] for test in re.finditer(
        r'^def (test_\w+).*?(?=^(?:def|@|class|# --)|\Z)', (run.ROOT / name).read_text(encoding='utf-8'), re.M | re.S)}
    for outer in ast.parse(source).body:
        if isinstance(outer, ast.ClassDef) and outer.name == 'Family':
            break
        if isinstance(outer, (ast.Import, ast.ImportFrom)) or (
                SCOPE[file] is not None and getattr(outer, 'name', None) not in SCOPE[file]):
            continue
        for inner in outer.body if isinstance(outer, ast.ClassDef) else [outer]:
            about = [n for n in (getattr(inner, 'name', '_'), getattr(outer, 'name', '_')) if n[0] != '_' and n != 'forward']
            mention = [t for t, text in tests.items() if any(re.search(rf'\b{name}\b', text) for name in about[:1])]
            stages = [[run.tests_of([file])[0], '-k', ' or '.join(mention)]] if mention else []
            for node in parts(inner):
                for text in changes(node):
                    begin, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)

                    def change(folder, begin=begin, end=end, text=text):
                        (folder / file).write_bytes(source[:begin] + text.encode() + source[end:])

                    name = '-'.join([file[:-3], *dict.fromkeys(about[::-1]), str(node.lineno), str(len(found))])
                    what = f"{' '.join(source[begin:end].decode().split())[:90]}  ->  {text[:90]}"
                    found.append((name, what, change, [*stages, *([t] for t in run.tests_of([file]))]))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', help='of the names of changes [all]')
    parser.add_argument('--n', type=int, default=200, help='changes [200]')
    parser.add_argument('--seed', type=int, default=0, help='of the draw [0]')
    parser.add_argument('--jobs', type=int, default=2, help='changes at once [2]')
    parser.add_argument('--list', action='store_true', help='say what would be changed, and change nothing')
    args = parser.parse_args()
    every = [mutant for file in SCOPE for mutant in mutants_of(file)]
    random.Random(args.seed).shuffle(every)
    drawn = [m for m in every[:args.n] if not args.words or any(word in m[0] for word in args.words)]
    print(f'{len(every)} changes are possible, {len(drawn)} of them are made', flush=True)
    if args.list:
        print(*(f'{name}: {what}' for name, what, *_ in drawn), sep='\n')
        return
    found = run.judge_all([(name, *rest) for name, _, *rest in drawn], args.jobs)
    for name, what, *_ in drawn:
        if not found[name].startswith('killed'):
            print(f'{name}: {what}')
    sys.exit(not all(verdict.startswith('killed') for verdict in found.values()))


if __name__ == '__main__':
    main()
