"""Programs that people point at a server of the OpenAI API work with this one, unchanged."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")
pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.tokenizers import JsonTokenizer
from bitnet_jax.evaluation.likelihood import TextModel
from bitnet_jax.evaluation.lm_harness import HarnessModel
from bitnet_jax.model_folders import load_text_model
from bitnet_jax.serving.engine import Engine
from bitnet_jax.serving.schemas import Served
from bitnet_jax.serving.server import Server
from tests.bitnet_jax.chat_folders import ANSWER, CONFIG, END, SIZE, TEMPLATE, tokenizer_json, write_folder
from tests.bitnet_jax.serving.tiny_models import CHUNK, model
from tests.bitnet_jax.serving.tiny_servers import started

CONTEXT = 16384  # the prompts of coding tools have thousands of bytes
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that answers every message with ANSWER."""
    config = CONFIG | {"max_position_embeddings": CONTEXT}
    folder = write_folder(tmp_path_factory.mktemp("talker") / "talker", {"config.json": config})

    def load() -> tuple[Engine, Served]:
        loaded = load_text_model(folder)
        engine = Engine(loaded.config, loaded.variables, loaded.tokenizer, slots=1, context=CONTEXT)
        return engine, Served("talker", loaded.tokenizer, loaded.conversation, CONTEXT)

    server = started(load)
    yield server
    server.stop()


def output(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.extended
def test_llm(talker: Server, tmp_path: Path) -> None:
    """The command line: models, an answer in a stream and at once, and a conversation on standard input."""
    pytest.importorskip("llm", reason="package llm is not installed; pip install llm")
    command = [sys.executable, "-m", "llm", "openai", "endpoint", f"{talker.address}/v1"]
    # Plug-ins of llm may need packages that are not installed.
    alone = {"LLM_LOAD_PLUGINS": "", "LLM_USER_PATH": str(tmp_path)}
    assert output([*command, "--models"], **alone).split() == ["talker"]
    asked = [*command, "-m", "talker", "-s", "Be brief.", "-o", "temperature", "0"]
    assert output([*asked, "What?"], **alone) == f"{ANSWER}\n"
    assert output([*asked, "--no-stream", "What?"], **alone) == f"{ANSWER}\n"
    done = subprocess.run(
        [*asked, "--chat"], input="What?\nAnd?\nexit\n", env=os.environ | alone, capture_output=True,
        text=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.stdout.count(ANSWER) == 2, done.stderr


@pytest.mark.extended
def test_langchain(talker: Server) -> None:
    """Messages, a stream with usage, log-probabilities, several at once, and an error."""
    library = pytest.importorskip(
        "langchain_openai", reason="package langchain-openai is not installed; pip install langchain-openai"
    )
    chat = library.ChatOpenAI(
        base_url=f"{talker.address}/v1", api_key="unused", model="talker", temperature=0, max_retries=0
    )
    messages = [("system", "Be brief."), ("human", "What?")]
    answer = chat.invoke(messages)
    assert (answer.content, answer.response_metadata["finish_reason"]) == (ANSWER, "stop")
    pieces = list(chat.stream(messages, stream_usage=True))
    assert "".join(piece.content for piece in pieces) == ANSWER
    (usage,) = (piece.usage_metadata for piece in pieces if piece.usage_metadata)
    assert usage["output_tokens"] == answer.usage_metadata["output_tokens"] > 1
    scored = chat.bind(logprobs=True).invoke(messages).response_metadata["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in scored).decode() == ANSWER
    assert [each.content for each in chat.batch([messages] * 3)] == [ANSWER] * 3
    with pytest.raises(Exception, match="best_of: unknown or unsupported field"):
        chat.invoke(messages, extra_body={"best_of": 2})


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same model with a template that shows tools. Of texts that a grammar allows it writes the first in order."""
    pytest.importorskip("llguidance", reason="package llguidance is not installed; pip install llguidance")
    folder = write_folder(tmp_path_factory.mktemp("caller") / "caller")
    template = "{%- for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}" + TEMPLATE

    def load() -> tuple[Engine, Served]:
        loaded = load_text_model(folder)
        conversation = dataclasses.replace(loaded.conversation, template=template)
        engine = Engine(loaded.config, loaded.variables, loaded.tokenizer, slots=1, context=256)
        return engine, Served("caller", loaded.tokenizer, conversation, 256)

    server = started(load)
    yield server
    server.stop()


def total_type(pydantic: Any) -> Any:
    """A type without further fields, which the model would write for ever."""
    number = (int, pydantic.Field(ge=0, le=99))
    return pydantic.create_model("Total", __config__={"extra": "forbid"}, total=number)


@pytest.mark.extended
@pytest.mark.parametrize("api", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(caller: Server, talker: Server, api: str) -> None:
    """Text, whole and as a stream; a function that is called and returns; an answer of a type; an error."""
    library = pytest.importorskip(
        "pydantic_ai", reason="no package pydantic-ai: pip install pydantic-ai-slim[openai]"
    )
    pydantic = pytest.importorskip("pydantic")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")

    openai = pytest.importorskip("openai")

    def client(server: Server) -> Any:
        return openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0)

    def model(name: str, link: Any) -> Any:
        return getattr(models, api)(name, provider=providers.OpenAIProvider(openai_client=link))

    async def scenario() -> None:
        async with client(talker) as talking, client(caller) as calling:
            await text(model("talker", talking))
            await tools(model("caller", calling))

    async def text(model: Any) -> None:
        agent = library.Agent(model, instructions="Be brief.", model_settings={"temperature": 0})
        assert (await agent.run("What?")).output == ANSWER
        async with agent.run_stream("What?") as stream:
            assert await stream.get_output() == ANSWER

    async def tools(model: Any) -> None:
        total = total_type(pydantic)
        settings = {"temperature": 0, "parallel_tool_calls": False}
        agent = library.Agent(model, output_type=total, model_settings=settings)
        called: list[int] = []

        async def first_only(context: Any, tool: Any) -> Any:
            return None if called else tool

        @agent.tool_plain(prepare=first_only)
        def add(number: Literal[7]) -> int:
            """Adds a number."""
            called.append(number)
            return 42

        done = await agent.run("Go?")
        assert called == [7]
        assert done.output.total in range(100)
        parts = [part for message in done.all_messages() for part in message.parts]
        results = [
            part.content for part in parts if part.part_kind == "tool-return" and part.tool_name == "add"
        ]
        assert results == [42]
        native = library.Agent(model, output_type=library.NativeOutput(total), model_settings=settings)
        assert (await native.run("Go?")).output.total in range(100)
        with pytest.raises(Exception, match="unknown or unsupported field"):
            await native.run("Go?", model_settings={"extra_body": {"top_k": 2}})

    asyncio.run(scenario())


@pytest.mark.extended
def test_instructor(caller: Server) -> None:
    """An answer of a type, as JSON of its schema and as the call of a function."""
    instructor = pytest.importorskip("instructor", reason="no package instructor: pip install instructor")
    pydantic = pytest.importorskip("pydantic")
    openai = pytest.importorskip("openai")
    total = total_type(pydantic)
    messages = [{"role": "user", "content": "Go?"}]
    with openai.OpenAI(base_url=f"{caller.address}/v1", api_key="unused") as plain:
        for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
            client = instructor.from_openai(plain, mode=mode)
            answer, raw = client.chat.completions.create_with_completion(
                model="caller", messages=messages, response_model=total, max_retries=0, temperature=0
            )
            assert answer.total in range(100)
            reason = "tool_calls" if mode is instructor.Mode.TOOLS else "stop"
            assert raw.choices[0].finish_reason == reason


@pytest.mark.slow
def test_aider(talker: Server, tmp_path: Path) -> None:
    """One message without a terminal, a repository, or changes of files; its own prompts have thousands of bytes."""
    aider = shutil.which("aider")
    if aider is None:
        pytest.skip("no aider on the path; pip install aider-chat, in a separate environment")
    command = [
        aider, "--model", "openai/talker", "--message", "What?", "--dry-run", "--no-git", "--yes-always", "--no-pretty",
        "--no-check-update", "--analytics-disable", "--no-show-model-warnings", "--no-show-release-notes",
        "--map-tokens", "0", "--no-detect-urls",
    ]  # fmt: skip
    environment = {
        "OPENAI_API_BASE": f"{talker.address}/v1", "OPENAI_API_KEY": "unused", "HOME": str(tmp_path),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, timeout=300
    )
    assert ANSWER in done.stdout.decode(), done.stderr.decode()


TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_text": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, temperature: 0}
metric_list: [{metric: exact_match}]
""",
}


@pytest.mark.slow
def test_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores of tasks on the served model are those on the model, to the last digit, and so are generated texts.

    `local-completions` scores with `echo` and generates from tokens; `local-chat-completions` sends messages.
    """
    lm_eval = pytest.importorskip("lm_eval", reason="no package lm-eval: pip install lm-eval[api]")
    tasks_module = pytest.importorskip("lm_eval.tasks")
    for package in ("transformers", "aiohttp", "tenacity"):
        pytest.importorskip(package, reason=f"package {package} is not installed; pip install {package}")
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    records = [
        {"question": f"What is {i}?", "choices": [f"number {i}", "a word", "no"], "label": i % 3}
        for i in range(8)
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    for name, task in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/records.jsonl}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}test_split: test{task}")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(tokenizer_json())
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps(special | {"chat_template": TEMPLATE})
    )

    tokenizer = JsonTokenizer(tokenizer_json())
    conversation = Conversation(end=(END,), template=TEMPLATE)
    served_model = model("bitnet_b158", SIZE)

    def server(kv_format: str | None) -> Server:
        def load() -> tuple[Engine, Served]:
            engine = Engine(*served_model, tokenizer, slots=2, chunk=CHUNK, kv_format=kv_format)
            return engine, Served("tiny", tokenizer, conversation, engine.context)

        return started(load)

    def results(lm: Any, task: str, **how: Any) -> tuple[Any, list[Any]]:
        """The values of the metrics, and the answer to every request."""
        manager = tasks_module.TaskManager(include_path=str(tmp_path))
        found = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, **how)
        values = {name: value for name, value in found["results"][task].items() if "," in name}
        return values, [answer for sample in found["samples"][task] for answer in sample["resps"]]

    ours = HarnessModel(TextModel(*served_model, tokenizer, conversation))
    local = f",tokenizer={tmp_path}/tokenizer,tokenizer_backend=huggingface,max_length=160"

    generating = server(None)  # both generate with the default cache ...
    try:
        base = f"model=tiny,base_url={generating.address}/v1"
        completions = results("local-completions", "tiny_text", model_args=f"{base}/completions{local}")
        messages = results(
            "local-chat-completions", "tiny_text", apply_chat_template=True,
            model_args=f"{base}/chat/completions,eos_string=<|im_end|>",
        )  # fmt: skip
    finally:
        generating.stop()
    assert completions == results(ours, "tiny_text")
    assert messages == results(ours, "tiny_text", apply_chat_template=True)

    scoring = server("float32")  # ... and the adapter scores without one
    try:
        base = f"model=tiny,base_url={scoring.address}/v1"
        values, scores = results("local-completions", "tiny_choice", model_args=f"{base}/completions{local}")
    finally:
        scoring.stop()
    expected_values, expected = results(ours, "tiny_choice")
    assert values == expected_values
    for ((got, greedy),), ((wanted, expected_greedy),) in zip(scores, expected, strict=True):
        assert greedy == expected_greedy
        assert got == pytest.approx(wanted, rel=1e-6)  # two programs order the sums of attention differently
