from __future__ import annotations

import contextlib
import json

import pytest
from tiny_tokenizer import END, START, byte_fallback, byte_level, fast, save, with_start_token

from nanoflow_tune.runtime.chat_text import ChatText, load_chat_text


def test_a_saved_folder_encodes_like_transformers_and_decodes_back(tmp_path):
    text = load_chat_text(save(tmp_path, with_start_token(byte_level())))
    assert text is not None
    ids = text.encode("the capital of France")
    assert ids == tuple(fast(with_start_token(byte_level()))("the capital of France").input_ids)
    assert text.decode(ids) == "the capital of France"


def test_a_chat_follows_the_template_and_gets_no_second_start_token(tmp_path):
    text = load_chat_text(save(tmp_path, with_start_token(byte_level())))
    assert text is not None
    ids = text.encode_chat([{"role": "user", "content": "hi"}])
    tokens = [text.token_bytes(token_id).decode() for token_id in ids]
    assert "".join(tokens) == f"{START}user\nhi{END}{START}assistant\n"


def test_a_template_that_refuses_and_a_missing_one_are_told():
    text = ChatText(fast(byte_level()))
    with pytest.raises(ValueError, match="refuses these messages: no tools"):
        text.encode_chat([{"role": "tool", "content": "x"}])
    bare = ChatText(fast(byte_level(), template=None))
    assert not bare.has_chat_template
    with pytest.raises(ValueError, match="no chat template: use /v1/completions"):
        bare.encode_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_of_tokens_join_to_the_text(make):
    tokenizer = make()
    text = ChatText(fast(tokenizer))
    content = "a \u20ac\u00e9"
    ids = tokenizer.encode(content.replace(" ", "\u2581") if make is byte_fallback else content).ids
    assert b"".join(map(text.token_bytes, ids)).decode() == content
    assert text.token_bytes(tokenizer.token_to_id(END)) == END.encode()
    assert text.token_bytes(99999) == b""


def test_a_folder_without_tokenizer_files_has_none(tmp_path):
    assert load_chat_text(tmp_path) is None


def test_a_template_of_its_own_file_comes_before_the_folders(tmp_path):
    save(tmp_path)
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    text = load_chat_text(tmp_path, template)
    assert text.decode(text.encode_chat([{"role": "user", "content": "hi"}])) == "[hi]"
    assert text.num_token_ids == len(fast(byte_level()))


def test_a_file_that_is_no_template_is_named(tmp_path):
    save(tmp_path)
    template = tmp_path / "own.jinja"
    template.write_text("line\n{% for m in messages %}")
    with pytest.raises(ValueError, match=r"own\.jinja, line \d: no chat template in Jinja"):
        load_chat_text(tmp_path, template)
    template.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read"):
        load_chat_text(tmp_path, template)
    with pytest.raises(ValueError, match="cannot be read"):
        load_chat_text(tmp_path, tmp_path / "none.jinja")
    template.write_text("{{ raise_exception('a system message is needed') }}")
    text = load_chat_text(tmp_path, template)  # clients are told, when they leave it out
    with pytest.raises(ValueError, match="a system message is needed"):
        text.encode_chat([{"role": "user", "content": "hi"}])


def test_code_in_a_folder_is_never_run(tmp_path):
    save(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "custom.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Custom: pass\n")
    config = tmp_path / "tokenizer_config.json"
    values = json.loads(config.read_text())
    values |= {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": [None, "custom.Custom"]}}
    config.write_text(json.dumps(values))
    with contextlib.suppress(ValueError):  # to refuse the folder is as good as not to run it
        load_chat_text(tmp_path)
    assert not ran.exists()


def test_a_broken_tokenizer_file_is_named(tmp_path):
    save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        load_chat_text(tmp_path)


def test_templates_run_in_a_sandbox():
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    text = ChatText(fast(byte_level(), template=attack))
    with pytest.raises(ValueError, match="unsafe"):
        text.encode_chat([{"role": "user", "content": "x"}])
