"""What a model's name points to: folders, buckets, the hub, and code that must not run."""

import json
import shutil
import sys

import huggingface_hub
import numpy as np
import pytest
import transformers
from helpers import meshes
from helpers.buckets import Bucket, empty_bucket

from mmpo_jax.checkpoints.checkpoint import load_checkpoint, load_processor
from mmpo_jax.checkpoints.fingerprints import fingerprint_model
from mmpo_jax.checkpoints.folders import copy_base, resolve_folder, write_dtype
from mmpo_jax.checkpoints.huggingface import save_model
from mmpo_jax.core.trees import flatten
from mmpo_jax.models.config import ModelError

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def mesh():
    return meshes.mesh_of(1, 4, 2)


@pytest.fixture
def bucket(tiny_folder, tiny_model, tmp_path, monkeypatch):
    """Holds a sharded copy of the tiny checkpoint at gs://bucket/models/tiny."""
    save_model(tmp_path / "sharded", *tiny_model, tiny_folder, max_shard_bytes=40_000)
    system = empty_bucket(monkeypatch)
    for file in (tmp_path / "sharded").iterdir():
        system.pipe_file(f"gs://bucket/models/tiny/{file.name}", file.read_bytes())
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path / "cache"))
    return system


def test_a_bucket(bucket, tiny_folder, tiny_model, tiny_processor, tmp_path, mesh):
    checkpoint = load_checkpoint("gs://bucket/models/tiny/", mesh)
    assert checkpoint.folder == "gs://bucket/models/tiny"
    assert checkpoint.model == tiny_model[0]
    assert checkpoint.processor.fingerprints() == tiny_processor.fingerprints()
    loaded, expected = flatten(checkpoint.params), flatten(tiny_model[1])
    for path, leaf in expected.items():
        np.testing.assert_array_equal(np.asarray(loaded[path]), leaf, err_msg=path)
    copied = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert {"config.json", "tokenizer.json"} <= copied
    assert not any("safetensors" in name for name in copied)


def test_what_a_bucket_no_longer_has_is_forgotten(bucket, tiny_model):
    folder = "gs://bucket/models/tiny"
    before = load_processor(folder).tokenizer.chat_template
    template = f"{folder}/chat_template.jinja"
    bucket.pipe_file(template, before.replace("\n", "").encode() + b"{# new #}")
    assert "{# new #}" in load_processor(folder).tokenizer.chat_template
    bucket.rm(template)
    with pytest.raises(Exception, match="no chat template"):
        load_processor(folder)


def test_fingerprint_of_a_bucket_reads_no_weights(bucket, monkeypatch):
    folder = "gs://bucket/models/tiny"
    opened = []
    real = Bucket._open
    monkeypatch.setattr(
        Bucket,
        "_open",
        lambda self, path, *a, **k: opened.append(path) or real(self, path, *a, **k),
    )
    first = fingerprint_model(folder)
    assert opened
    assert not any(path.endswith(".safetensors") for path in opened)
    assert fingerprint_model(folder) == first
    name = next(path for path in bucket.find(folder) if path.endswith("2-of-00004.safetensors"))
    bucket.pipe_file(name, bucket.cat_file(name) + b"x")
    assert fingerprint_model(folder) != first


def test_buckets_that_are_not_there(bucket, monkeypatch):
    with pytest.raises(ModelError, match=r"gs://bucket/other/config\.json: not found"):
        resolve_folder("gs://bucket/other")
    with pytest.raises(ModelError, match="ftp://host/model: nothing is read or written by ftp://"):
        resolve_folder("ftp://host/model")

    def refuse(*_):
        raise PermissionError("no credentials")

    monkeypatch.setattr(Bucket, "exists", refuse)
    with pytest.raises(ModelError, match="cannot be reached: no credentials; gs:// needs cred"):
        resolve_folder("gs://bucket/models/tiny")


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf", None),
        ("Qwen/Qwen2.5-VL-7B@main", "Qwen/Qwen2.5-VL-7B", "main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
    ],
)
def test_a_hub_id(name, repository, revision, tiny_folder, tiny_model, mesh, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = load_checkpoint(name, mesh)
    assert checkpoint.folder == str(tiny_folder)
    assert (asked["repo_id"], asked["revision"]) == (repository, revision)
    kept = list(
        huggingface_hub.utils.filter_repo_objects(
            [
                "config.json",
                "model.safetensors",
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json",
                "preprocessor_config.json",
                "pytorch_model.bin",
                "modeling_llava.py",
                "consolidated.safetensors",
                "original/model.safetensors",
                "training_args.bin",
                "README.md",
            ],
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked["ignore_patterns"],
        )
    )
    assert kept == [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "preprocessor_config.json",
    ]


@pytest.mark.parametrize(
    ("named", "kept"),
    [
        ("consolidated.safetensors", ["consolidated.safetensors"]),
        (
            "other.safetensors.index.json",
            ["other.safetensors.index.json", "other-00001-of-00001.safetensors"],
        ),
        ("pytorch_model.bin", []),
        ("*.safetensors", []),
        (["consolidated.safetensors"], []),
    ],
)
def test_weights_that_a_repository_names(named, kept, tmp_path, monkeypatch):
    """Its config comes first; what that names as `transformers_weights` is downloaded too."""
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append(options)
        (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": named}))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve_folder("org/name")
    assert asked[0]["allow_patterns"] == ["config.json"]
    files = [
        "consolidated.safetensors",
        "other.safetensors.index.json",
        "other-00001-of-00001.safetensors",
        "pytorch_model.bin",
        "deep/consolidated.safetensors",
    ]
    options = {key: asked[-1][key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(files, **options)) == kept


def test_a_folder_comes_before_the_hub(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    shutil.copytree(tiny_folder, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("org/name") == str(tmp_path / "org" / "name")


def test_the_hubs_cache_serves_offline(tiny_folder, tmp_path, monkeypatch):
    """The hub's own function; the tests run in its offline mode."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    snapshot = shutil.copytree(tiny_folder, repository / "snapshots" / SHA)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    assert resolve_folder("org/name") == resolve_folder(f"org/name@{SHA}") == str(snapshot)


def test_offline_without_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    told = "org/name@v2: no such folder here, nothing .* in the hub's cache, and the hub cannot be"
    with pytest.raises(ModelError, match=told) as caught:
        resolve_folder("org/name@v2")
    assert "\n" not in str(caught.value)


def test_a_repository_that_is_not_there(monkeypatch):
    def refuse(*_, **__):
        response = httpx_response(404)
        raise huggingface_hub.errors.RepositoryNotFoundError("404", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"org/name: .* the hub has no such repository"):
        resolve_folder("org/name")


def httpx_response(status):
    class Response:
        headers: dict = {}  # noqa: RUF012
        status_code = status
        request = None

    return Response()


@pytest.mark.parametrize("name", ["/nowhere/llava", "./runs/a", "runs/a/model", "~/llava", "llava"])
def test_no_folder(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ModelError, match=f"{name}: there is no such checkpoint folder"):
        resolve_folder(name)


HARM = """
import pathlib
pathlib.Path({!r}).touch()
from transformers import LlamaConfig, PreTrainedTokenizerFast as EvilTokenizer
class EvilConfig(LlamaConfig):  # transformers marks the class, which others must not see
    pass
"""
AUTO_MAP = {"AutoConfig": "evil.EvilConfig", "AutoTokenizer": ["evil.EvilTokenizer", None]}


@pytest.fixture
def harm(tmp_path):
    """The file that the code in the folder `evil` would make."""
    return tmp_path / "harm"


@pytest.fixture
def evil(tiny_folder, tmp_path, harm):
    """A folder that asks for its own code to be run, everywhere it can."""
    folder = shutil.copytree(tiny_folder, tmp_path / "evil")
    (folder / "evil.py").write_text(HARM.format(str(harm)))
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"auto_map": AUTO_MAP}))
    return folder


def test_code_beside_a_known_architecture_is_ignored(evil, harm, mesh):
    checkpoint = load_checkpoint(str(evil), mesh)
    assert checkpoint.processor.encode("red")
    assert not harm.exists()


def test_an_architecture_that_needs_code_is_refused(evil, harm, mesh):
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(ModelError, match=r"config\.json: model_type is 'evil'; .* llava_next"):
        load_checkpoint(str(evil), mesh)
    assert not harm.exists()


def test_the_code_would_do_harm(evil, harm, tmp_path, monkeypatch):
    """Where somebody trusts it; else the two tests above would pass whatever was run."""
    modules = transformers.dynamic_module_utils
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    transformers.AutoConfig.from_pretrained(evil, trust_remote_code=True)
    assert harm.exists()


def test_settings_of_the_image_processor_are_written_where_old_readers_look(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    settings = {"image_processor_type": "CLIPImageProcessor", "size": 4}
    (source / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    copy_base(source, tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "preprocessor_config.json").read_text())
    assert written == settings
    (source / "preprocessor_config.json").write_text('{"size": 5}')
    copy_base(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "preprocessor_config.json").read_text() == '{"size": 5}'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": 1}, {"a": 1, "torch_dtype": "bfloat16"}),
        ({"dtype": None}, {"dtype": None, "torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, {"torch_dtype": "bfloat16"}),
        (
            {"dtype": "float32", "t": {"dtype": "float32"}},
            {"dtype": "bfloat16", "t": {"dtype": "bfloat16"}},
        ),
        ({"dtype": "bfloat16", "t": {"dtype": None}}, None),
    ],
)
def test_the_config_says_what_dtype_the_weights_have(tmp_path, before, after):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(before))
    write_dtype(tmp_path, "bfloat16")
    if after is None:
        assert path.read_text() == json.dumps(before)
    else:
        assert json.loads(path.read_text()) == after
