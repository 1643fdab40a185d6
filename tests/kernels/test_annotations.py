"""Public functions and methods of `kernels` say what they take and return."""

import ast
import pathlib

import kernels


def missing(path):
    """Names of public functions of a module with an argument or a result without a type; nested ones are not public."""
    nodes = [("", ast.parse(path.read_text(encoding="utf-8")))]
    for prefix, parent in nodes:
        for node in parent.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                nodes.append((f"{prefix}{node.name}.", node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                given = node.args
                arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                typed = all(a.annotation for a in arguments if a is not None and a.arg not in ("self", "cls"))
                if not typed or node.returns is None:
                    yield f"{path.name}: {prefix}{node.name}"


def test_every_public_function_is_annotated(tmp_path):
    (root,) = map(pathlib.Path, kernels.__path__)
    assert [name for path in sorted(root.rglob("*.py")) for name in missing(path)] == []
    (tmp_path / "one.py").write_text("class A:\n    def f(self, x) -> int: ...\ndef g(*, y: int): ...\ndef _h(x): ...")
    assert list(missing(tmp_path / "one.py")) == ["one.py: g", "one.py: A.f"]
