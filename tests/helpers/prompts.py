"""Data files and a chat tokenizer for tests of tasks."""

import json


def write_lines(path, *lines) -> str:
    """Writes a JSON Lines file; a string is written as it is."""
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return str(path)


class Chat:
    """A tokenizer with a chat template; its tokens are bytes."""

    chat_template = "there is one"

    def apply_chat_template(self, turn, add_generation_prompt, return_dict):
        assert add_generation_prompt and return_dict and turn[0]["role"] == "user"
        return {"input_ids": list(turn[0]["content"].encode())}


def asked(task, record) -> str:
    """What a task asks in a chat."""
    return bytes(task.prompt(record, Chat())).decode()
