"""Answer questions on stdin until it ends: python serve.py MODULE, where MODULE is a file beside this one with ANSWERS.

A message is one line of JSON and the bytes of its arrays, in both directions: {"do": name, …, "arrays": [[dtype, shape]]}.
An answer that failed is {"error": text, "kind": class of the exception}. Nothing of paredown is imported: this runs under the
Python of another environment, where paredown is not installed. Nothing is pickled.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import IO, Any

import numpy as np


def send(stream: IO[bytes], message: dict[str, Any], arrays: Sequence[Any] = ()) -> None:
    """Write one message with its arrays."""
    solid = [np.require(a, requirements="C") for a in arrays]
    head = {**message, "arrays": [[a.dtype.str, list(a.shape)] for a in solid]}
    stream.write(json.dumps(head).encode() + b"\n")
    for array in solid:
        stream.write(array.tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[Any]]:
    """Read one message. Raises EOFError where the other side has ended."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message: dict[str, Any] = json.loads(line)
    arrays = []
    for kind, shape in message.pop("arrays"):
        dtype = np.dtype(kind)
        wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        data = stream.read(wanted)
        if len(data) != wanted:
            raise EOFError
        arrays.append(np.frombuffer(data, dtype).reshape(shape).copy())
    return message, arrays


def main(name: str) -> None:
    """The loop. What libraries print goes to stderr: stdout is for answers."""
    out, questions = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)
    answers = importlib.import_module(name).ANSWERS
    while True:
        try:
            question, arrays = receive(questions)
        except EOFError:
            return
        try:
            reply, results = answers[question.pop("do")](question, arrays)
        except Exception as error:
            reply, results = {"error": str(error)[:2000], "kind": type(error).__name__}, []
        send(out, reply, results)


if __name__ == "__main__":
    main(sys.argv[1])
