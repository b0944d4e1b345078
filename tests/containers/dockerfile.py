"""The Dockerfile as far as this repository uses it: stages, their instructions, arguments in FROM."""

import json
import re
import shlex


class Instruction:
    def __init__(self, name, text):
        self.name = name
        words = shlex.split(text, posix=True) if name in ("COPY", "ENV", "LABEL", "FROM", "HEALTHCHECK", "ARG") else []
        self.flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
        self.words = [word for word in words if not word.startswith("--")]
        self.text = text
        # The exec form, which needs no shell.
        listed = re.search(r"\[.*\]$", text)
        self.listed = json.loads(listed[0]) if listed else None

    @property
    def pairs(self):
        return dict(word.split("=", 1) for word in self.words)


class Stage:
    def __init__(self, base, name):
        self.base, self.name, self.instructions = base, name, []

    def all(self, name):
        return [one for one in self.instructions if one.name == name]

    def only(self, name):
        [one] = self.all(name)
        return one


def read(path):
    """The stages, in their order."""
    text = "".join(line + "\n" for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    arguments, stages = {}, []
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, rest = line.strip().split(None, 1)
        for argument, value in arguments.items():
            rest = rest.replace("${%s}" % argument, value) if name == "FROM" else rest
        one = Instruction(name, rest)
        if name == "ARG" and not stages:
            arguments.update(one.pairs)
        elif name == "FROM":
            stages.append(Stage(one.words[0], one.words[2] if len(one.words) == 3 else None))
        else:
            stages[-1].instructions.append(one)
    return stages
