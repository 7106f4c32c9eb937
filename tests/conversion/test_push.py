"""Pushing, with the real client of the Hub and a Hub on the loopback address."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load, load_file, save_file
from transformers import Trainer, TrainingArguments

from cmcr_hf import CMCRConfig, CMCRConnector, CMCRModel, CMCRProcessor
from cmcr_hf.cli import main
from cmcr_hf.conversion.folder import check_folder
from cmcr_hf.conversion.hub import EVAL_RESULTS, model_card, source_card, write_eval_results
from cmcr_hf.conversion.push import check_target, push_folder
from tests.hub_server import READER, WRITER, Fault, LocalHub, Repository

NAME = "org/cmcr-clip-clap"
COMMIT = rf"POST /api/models/{NAME}/commit/main"


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client would have waited between its tries."""
    seconds = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("push") / "cmcr-tiny"))
    config = CMCRConfig.from_pretrained(folder)
    card = model_card(config, repo_id="cmcr-tiny", licences={}, licence="apache-2.0", synthetic_note="random weights.")
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "cmcr-tiny"))


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commits(hub, name=NAME):
    return len(hub.repositories[name].commits)


def test_a_folder_is_pushed_in_one_commit_after_all_else(hub, folder):
    commit = push_folder(folder, NAME, message="The first")
    repository = hub.repositories[NAME]
    # That of the creation is the Hub's own.
    assert repository.messages == ["initial", "The first"]
    assert commit.oid == repository.head
    assert hub.requests[-1] == f"POST /api/models/{NAME}/commit/main"
    pushed = {name: data for name, data in repository.files.items() if name != ".gitattributes"}
    expected = content(folder)
    assert pushed.keys() == expected.keys()
    assert all(pushed[name] == expected[name] for name in expected if name not in ("README.md", "config.json"))


def test_the_paths_of_sources_that_were_folders_are_not_pushed(hub, folder, tiny_clip):
    assert str(tiny_clip) in (folder / "config.json").read_text()
    push_folder(folder, NAME)
    pushed = hub.repositories[NAME].files["config.json"].decode()
    assert str(tiny_clip.parent) not in pushed
    # Nothing else is changed.
    config = (folder / "config.json").read_text()
    for record in json.loads(config)["sources"].values():
        config = config.replace(record["id"], Path(record["id"]).name)
    assert pushed == config


def test_weights_in_several_parts_arrive_whole(hub, folder):
    push_folder(folder, NAME)
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) > 1
    assert hub.repositories[NAME].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_the_card_of_a_folder_names_the_repository_in_it(hub, folder):
    push_folder(folder, NAME)
    card = ModelCard(hub.repositories[NAME].files["README.md"].decode())
    assert f"\n# {NAME}\n" in card.text
    assert card.text.count(f'from_pretrained("{NAME}")') == 2
    assert "cmcr-tiny" not in card.text
    assert card.data.license == "apache-2.0"
    assert 'from_pretrained("cmcr-tiny")' in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["my model", "modèle ü", 'a"b', "a\nb", "a\\b", "cmcr.1"])
def test_the_card_of_a_folder_of_any_name_is_python_and_names_the_repository_once_pushed(hub, folder, name):
    config = CMCRConfig.from_pretrained(folder)
    card = model_card(config, repo_id=name, licences={})
    compile(card.text.split("```python\n")[1].split("```")[0], "usage", "exec")
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    push_folder(folder, NAME)
    pushed = ModelCard(hub.repositories[NAME].files["README.md"].decode())
    assert str(pushed) == str(model_card(config, repo_id=NAME, licences={}))


def test_a_card_of_another_heading_is_pushed_as_it_is(hub, folder):
    text = '---\nlicense: mit\n---\n# My own words\n\nCMCRModel.from_pretrained("cmcr-tiny")\n'
    (folder / "README.md").write_text(text)
    push_folder(folder, NAME)
    assert hub.repositories[NAME].files["README.md"].decode() == text


def test_pushing_again_what_is_there_makes_no_commit(hub, folder):
    first = push_folder(folder, NAME)
    assert push_folder(folder, NAME).oid == first.oid
    assert commits(hub) == 2


def test_stale_files_go_in_the_same_commit_and_results_of_others_stay(hub, folder):
    hub.repositories[NAME] = Repository()
    others = {name: b"- other\n" for name in (".gitattributes", ".eval_results/hle.yaml", EVAL_RESULTS)}
    hub.repositories[NAME].commit({**others, "model-00001-of-00002.safetensors": b"old", "notes/old.txt": b"old"})
    push_folder(folder, NAME)
    assert commits(hub) == 2
    kept = {".gitattributes": others[".gitattributes"], ".eval_results/hle.yaml": b"- other\n"}
    pushed = hub.repositories[NAME].files
    assert pushed.keys() == {*content(folder), *kept}
    assert all(pushed[name] == data for name, data in kept.items())


def test_results_for_the_hub_are_pushed_beside_the_card(hub, folder):
    rows = [{"dataset": "toy/pairs", "task": "retrieval", "metric": "mAP", "value": 0.25}]
    path = write_eval_results(folder, rows)
    push_folder(folder, NAME)
    assert hub.repositories[NAME].files[EVAL_RESULTS] == path.read_bytes()


def test_what_a_run_of_trainer_leaves_beside_the_model_is_not_pushed(hub, folder):
    for name in ("training_args.bin", "checkpoint-3/model.safetensors", ".git/config", "__pycache__/a.pyc"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    push_folder(folder, NAME)
    assert not {name for name in hub.repositories[NAME].files if "git/" in name or "checkpoint" in name}
    assert "training_args.bin" not in hub.repositories[NAME].files
    assert "__pycache__/a.pyc" not in hub.repositories[NAME].files


def test_with_xet_it_is_one_commit_too(hub, folder, monkeypatch):
    def upload(*, additions, **_):
        for addition in additions:
            with addition.as_file() as file:
                hub.objects[addition.upload_info.sha256.hex()] = file.read()

    # Its servers are not those of the Hub; what they are given comes before the commit, in the same client.
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: True)
    monkeypatch.setattr("huggingface_hub._commit_api._upload_xet_files", upload)
    push_folder(folder, NAME)
    assert commits(hub) == 2
    assert not [request for request in hub.requests if "/lfs/" in request]
    assert hub.repositories[NAME].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_branch_is_made_and_main_stays(hub, folder):
    main = push_folder(folder, NAME).oid
    (folder / "notes.txt").write_text("new")
    commit = push_folder(folder, NAME, revision="v2")
    repository = hub.repositories[NAME]
    assert (repository.head, repository.refs["v2"]) == (main, commit.oid)
    assert "notes.txt" in repository.commits[commit.oid]
    assert "notes.txt" not in repository.files


def test_a_private_repository_is_created_private_and_can_be_pushed_to_again(hub, folder):
    push_folder(folder, NAME, private=True)
    assert hub.repositories[NAME].hidden
    (folder / "notes.txt").write_text("new")
    push_folder(folder, NAME, private=True)
    assert "notes.txt" in hub.repositories[NAME].files


def test_nothing_private_is_pushed_to_a_public_repository(hub, folder):
    push_folder(folder, NAME)
    (folder / "notes.txt").write_text("a secret")
    with pytest.raises(ValueError, match=f"{NAME} exists and is public, so nothing was pushed"):
        push_folder(folder, NAME, private=True)
    assert commits(hub) == 2


def test_a_name_alone_is_a_repository_of_the_user(hub, folder):
    push_folder(folder, "cmcr-mine")
    assert list(hub.repositories) == ["org/cmcr-mine"]
    assert b'from_pretrained("org/cmcr-mine")' in hub.repositories["org/cmcr-mine"].files["README.md"]


@pytest.mark.parametrize(
    "request_",
    [
        r"POST /api/models/.*/preupload/main",
        r"POST /.*/info/lfs/objects/batch",
        r"PUT /lfs/.*/2",
        r"POST /lfs/\w{64}",
        r"POST /lfs/verify",
        COMMIT,
    ],
)
def test_a_push_that_breaks_changes_nothing_and_the_next_one_completes_it(hub, folder, waits, request_):
    push_folder(folder, NAME)
    before = hub.repositories[NAME].files
    model = CMCRModel.from_pretrained(folder)
    with torch.no_grad():
        model.connector.logit_scale += 1
    model.save_pretrained(folder)
    hub.faults = [Fault(request_, times=99, after=100)]
    with pytest.raises(OSError, match=rf"The connection to .* broke .* To go on, run `cmcr push .* {NAME}`\."):
        push_folder(folder, NAME)
    assert commits(hub) == 2
    assert hub.repositories[NAME].files is before
    hub.faults = []
    push_folder(folder, NAME)
    assert commits(hub) == 3
    pushed = load(hub.repositories[NAME].files["model.safetensors"])
    assert torch.equal(pushed["connector.logit_scale"], model.connector.logit_scale.detach())


def test_uploaded_weights_are_not_sent_again_after_a_broken_commit(hub, folder, waits):
    hub.faults = [Fault(COMMIT, after=10)]
    with pytest.raises(OSError, match="broke"):
        push_folder(folder, NAME)
    hub.requests.clear()
    push_folder(folder, NAME)
    assert not [request for request in hub.requests if request.startswith("PUT")]
    assert commits(hub) == 2


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(r"PUT /lfs/.*/1", 503, times=2), [1, 2]),
        (Fault(r"PUT /lfs/.*/1", 429, headers={"Retry-After": "3"}), [4.0]),
        (Fault(r"POST /.*/preupload/main", 500), [1]),
        (Fault(r"PUT /lfs/.*/1", after=100), [1]),
    ],
    ids=["503 twice", "429 with Retry-After", "500", "cut"],
)
def test_the_client_tries_again_where_the_hub_is_busy_or_the_line_is_cut(hub, folder, waits, fault, expected):
    hub.faults = [fault]
    push_folder(folder, NAME)
    assert waits == expected
    assert commits(hub) == 2


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (COMMIT, 429, r"too many requests of yours \(429\)\. Wait"),
        (COMMIT, 503, r"The Hub is in trouble \(503\)\. .* To go on, run `cmcr push .*`\."),
        (COMMIT, 412, r"changed while it was pushed to \(412\)"),
        (COMMIT, 413, r"The Hub refuses the push to .* \(413\)"),
        (r"POST /api/repos/create", 502, r"in trouble \(502\)"),
        (r"PUT /lfs/.*/1", 403, r"may not write to .* \(403"),
    ],
)
def test_each_refusal_is_one_sentence_that_says_what_to_do(hub, folder, waits, request_, status, message):
    hub.faults = [Fault(request_, status, times=99)]
    with pytest.raises(OSError, match=message) as caught:
        push_folder(folder, NAME)
    assert "\n" not in str(caught.value)
    assert commits(hub) == 1 if "create" not in request_ else NAME not in hub.repositories


def test_a_page_of_html_in_place_of_an_answer_is_trouble_of_the_hub(hub, folder):
    hub.faults = [Fault("POST /api/validate-yaml", 503, body=b"<html>")]
    with pytest.raises(OSError, match="The Hub answers what is no JSON"):
        push_folder(folder, NAME)
    assert commits(hub) == 1


def test_a_commit_of_another_in_the_meantime_is_not_overwritten(hub, folder, monkeypatch):
    push_folder(folder, NAME)
    (folder / "notes.txt").write_text("new")
    read = Path.read_text

    def read_late(path, *arguments, **options):
        if path.name == "README.md" and len(hub.repositories[NAME].commits) == 2:
            hub.repositories[NAME].commit({"of": b"another"})
        return read(path, *arguments, **options)

    monkeypatch.setattr("cmcr_hf.conversion.push.check_folder", lambda folder: None)
    monkeypatch.setattr(Path, "read_text", read_late)
    with pytest.raises(OSError, match="changed while it was pushed to"):
        push_folder(folder, NAME)
    assert hub.repositories[NAME].files == {"of": b"another"}


def test_without_a_token_the_user_is_told_to_log_in(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with pytest.raises(OSError, match=r"\(401\)\. Run `hf auth login`, or set HF_TOKEN"):
        push_folder(folder, NAME)
    with pytest.raises(OSError, match=r"You are not logged in\. Run `hf auth login`"):
        push_folder(folder, NAME, token=True)
    assert hub.repositories == {}


def test_a_token_that_may_only_read_is_told_from_none(hub, folder):
    push_folder(folder, NAME)
    for name in (NAME, "another/name"):
        with pytest.raises(OSError, match=rf"Your token may not write to {name} \(403"):
            push_folder(folder, name, token=READER)
    assert commits(hub) == 2


def test_what_speaks_against_a_push_is_known_before_the_work(hub, monkeypatch):
    check_target(NAME)
    with pytest.raises(ValueError, match="Expected a repository as ORG/NAME, got 'a b/c'"):
        check_target("a b/c")
    with pytest.raises(OSError, match=r"may read alone\. Make one .* run `hf auth login`\.$"):
        check_target(NAME, token=READER)
    with pytest.raises(OSError, match=r"\(401\)\. Run `hf auth login`, or set HF_TOKEN\.$"):
        check_target(NAME, token="hf_wrong")
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(OSError, match=r"You are not logged in\. Run `hf auth login`, or set HF_TOKEN\.$"):
        check_target(NAME)
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        check_target(NAME, token=WRITER)
    assert hub.repositories == {}


def test_a_broken_push_names_the_command_that_goes_on_with_its_options(hub, folder, waits):
    hub.faults = [Fault(r"POST /api/repos/create", 503, times=99)]
    spaced = folder.rename(folder.parent / "my model")
    with pytest.raises(OSError, match=rf"run `cmcr push '{spaced}' {NAME} --private --revision v2`\.$"):
        push_folder(spaced, NAME, private=True, revision="v2")
    with pytest.raises(OSError, match=r"To go on, run the same again\.$"):
        CMCRModel.from_pretrained(spaced).push_to_hub(NAME)


def test_offline_the_hub_is_not_asked(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"HF_HUB_OFFLINE is set\. Unset it"):
        push_folder(folder, NAME)


def test_a_server_that_is_not_there_is_named(folder, monkeypatch, waits):
    with LocalHub() as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match=f"The connection to {gone.url} broke"):
        push_folder(folder, NAME)


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def link(folder, name, target):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def write_results(folder, text):
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "mine.yaml").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "There is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds no model: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("{}"), r"names no model_type"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights: model.safetensors is missing"),
        (lambda folder: truncate(folder / "model.safetensors"), "weights in .* are damaged"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}'
            ),
            "has no weights: model-00002-of-00002.safetensors is missing",
        ),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "weights in .* are damaged"),
        (lambda folder: (folder / "processor_config.json").unlink(), "has no complete processor"),
        (lambda folder: shutil.rmtree(folder / "clap_tokenizer"), "no complete processor: .* no folder 'clap_tokeniz"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no complete processor"),
        (lambda folder: (folder / "modeling_cmcr.py").unlink(), "is not complete: it has no modeling_cmcr.py"),
        (lambda folder: (folder / "README.md").unlink(), "has no model card. Write .*README.md"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "metadata of .*README.md cannot be r"),
        (
            lambda folder: change_weights(folder, lambda weights: weights.pop("connector.logit_scale")),
            r"not those of its config.json: connector.logit_scale is missing, expected \(\) \(1 differ\)",
        ),
        (
            lambda folder: change_weights(folder, lambda weights: weights.update(extra=torch.zeros(2))),
            r"not those of its config.json: extra is \(2,\), expected none",
        ),
        (
            lambda folder: edit_config(folder, projection_dim=16),
            r"not those of its config.json: connector.projectors\S+ is \(8,\), expected \(16,\)",
        ),
        (lambda folder: edit_config(folder, projection_dim=-1), "config.json makes no model: .*projection_dim"),
        (lambda folder: (folder / "modeling_cmcr.py").write_text(""), "modeling_cmcr.py is not .* of the installed"),
        (lambda folder: (folder / "losses_cmcr.py").write_text("1"), "losses_cmcr.py is not .* Save the model anew"),
        (lambda folder: (folder / "losses_cmcr.py").unlink(), "is not complete: it has no losses_cmcr.py"),
        (lambda folder: (folder / "README.md").write_text(""), "The model card .*README.md is empty"),
        (lambda folder: (folder / "README.md").write_text("---\nlicense: mit\n---\n"), "README.md is empty"),
        (lambda folder: (folder / "pytorch_model.bin").write_text("x"), "pytorch_model.bin in .* is a pickle"),
        (lambda folder: (folder / "clap_tokenizer" / "a.pkl").write_text("x"), "clap_tokenizer/a.pkl in .* is a p"),
        (lambda folder: link(folder, "notes.txt", "/etc/hosts"), "notes.txt in .* is a link to /etc/hosts"),
        (lambda folder: link(folder, "notes.txt", "absent"), "notes.txt in .* is a link to absent"),
        (lambda folder: link(folder, "more", "/etc"), "more in .* is a link to /etc"),
        (lambda folder: (folder / "conversion.json").write_text("{"), "metadata of .*conversion.json cannot be read"),
        (lambda folder: (folder / "conversion.json").write_text("[]"), "conversion.json cannot be .* with the keys"),
        (lambda folder: write_results(folder, "- value: 3"), "metadata of .*mine.yaml cannot be read"),
        (lambda folder: write_results(folder, "a: ["), "metadata of .*mine.yaml cannot be read"),
    ],
)
def test_a_folder_that_is_not_complete_is_refused_before_any_request(hub, folder, damage, message):
    damage(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message) as caught:
            push_folder(folder, NAME)
    assert "\n" not in str(caught.value)
    assert hub.requests == []


def test_a_link_within_the_folder_is_pushed_as_a_file(hub, folder):
    link(folder, "LICENSE", "README.md")
    push_folder(folder, NAME)
    assert hub.repositories[NAME].files["LICENSE"] == (folder / "README.md").read_bytes()


def test_a_card_without_a_licence_is_warned_of(folder, monkeypatch):
    lines = []
    monkeypatch.setattr("cmcr_hf.conversion.folder.logger.warning", lines.append)
    check_folder(folder)
    assert lines == []
    (folder / "README.md").write_text("# A model\n")
    check_folder(folder)
    assert [line.split(" names ")[1][:11] for line in lines] == ["no licence."]


def test_a_connector_whose_source_is_a_folder_is_refused(hub, folder, tiny_clip, tmp_path):
    connector = tmp_path / "connector"
    CMCRModel.from_pretrained(folder).connector.save_pretrained(connector)
    CMCRProcessor.from_pretrained(folder).save_pretrained(connector)
    shutil.copy(folder / "README.md", connector)
    with pytest.raises(ValueError, match=r"finds its cl[ia]p source in .* which nobody else has\. Push the f"):
        push_folder(connector, NAME)
    edit_config(connector, sources={space: {"id": f"org/{space}"} for space in ("clip", "clap")})
    push_folder(connector, NAME)
    assert commits(hub) == 2


def test_a_model_of_clip_and_ulip_is_complete_without_a_part_for_audio(tiny_ulip_model, tmp_path):
    folder = Path(shutil.copytree(tiny_ulip_model, tmp_path / "ulip"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Clouds\n")
    check_folder(folder)
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no complete processor"):
        check_folder(folder)


@pytest.mark.parametrize("source", ["tiny_clip", "tiny_clap", "tiny_ulip", "tiny_text_ulip"])
def test_sources_are_checked_for_the_parts_of_their_towers(source, tmp_path, request):
    folder = Path(shutil.copytree(request.getfixturevalue(source), tmp_path / source))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A source\n")
    check_folder(folder)
    parts = {path.name for path in folder.iterdir()} & {"preprocessor_config.json", "tokenizer_config.json"}
    assert parts == {"preprocessor_config.json"} | ({"tokenizer_config.json"} if source != "tiny_ulip" else set())
    for part in parts:
        (folder / part).rename(tmp_path / part)
        with pytest.raises(ValueError, match=f"is not complete: it has no {part}"):
            check_folder(folder)
        (tmp_path / part).rename(folder / part)


def test_a_converted_source_is_pushed_with_its_card(hub, tiny_clap, tmp_path):
    folder = Path(shutil.copytree(tiny_clap, tmp_path / "clap"))
    conversion = {"kind": "laion-clap", "file": "a.pt", "sha256": "0", "reference": "none", "bound": 1}
    config = SimpleNamespace(model_type="clap")
    card = source_card(config, repo_id="clap", licence="mit", conversion={**conversion, "differences": {"text": 0}})
    (folder / "README.md").write_text(str(card))
    push_folder(folder, "org/clap")
    pushed = hub.repositories["org/clap"].files["README.md"].decode()
    assert 'ClapModel.from_pretrained("org/clap")' in pushed
    assert 'clap="org/clap"' in pushed


def test_a_model_is_pushed_with_code_processor_and_card_in_one_commit(hub, folder):
    model, processor = CMCRModel.from_pretrained(folder), CMCRProcessor.from_pretrained(folder)
    commit = model.push_to_hub(NAME, processor=processor, commit_message="Mine", tags=["toy"])
    repository = hub.repositories[NAME]
    assert (repository.messages, repository.head) == (["initial", "Mine"], commit.oid)
    assert repository.files.keys() == {".gitattributes", *content(folder)}
    assert repository.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = ModelCard(repository.files["README.md"].decode())
    assert "| clip | clip | not recorded | not stated |" in card.text
    assert {"c-mcr", "toy"} <= set(card.data.tags)


def test_a_card_that_is_there_is_kept_and_tagged(hub, folder):
    push_folder(folder, NAME)
    model = CMCRModel.from_pretrained(folder)
    card = hub.repositories[NAME].files["README.md"]
    model.push_to_hub(NAME)
    assert hub.repositories[NAME].files["README.md"] == card
    model.push_to_hub(NAME, tags=["toy"])
    found = ModelCard(hub.repositories[NAME].files["README.md"].decode())
    assert found.text == ModelCard(card.decode()).text
    assert found.data.tags == [*ModelCard(card.decode()).data.tags, "toy"]


def test_the_empty_card_that_a_processor_brings_is_replaced(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub.hf_api", huggingface_hub.HfApi)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    CMCRProcessor.from_pretrained(folder).push_to_hub(NAME)
    assert "Model Card for Model ID" in hub.repositories[NAME].files["README.md"].decode()
    CMCRModel.from_pretrained(folder).push_to_hub(NAME)
    assert f"\n# {NAME}\n" in hub.repositories[NAME].files["README.md"].decode()
    assert hub.repositories[NAME].files.keys() == {".gitattributes", *content(folder)}


def test_a_model_pushed_alone_leaves_the_processor_and_takes_old_shards_away(hub, folder):
    model, processor = CMCRModel.from_pretrained(folder), CMCRProcessor.from_pretrained(folder)
    model.push_to_hub(NAME, processor=processor, max_shard_size="100KB")
    sharded = set(hub.repositories[NAME].files)
    assert {"model.safetensors.index.json", "processor_config.json"} <= sharded
    model.push_to_hub(NAME)
    files = set(hub.repositories[NAME].files)
    assert files - sharded == {"model.safetensors"}
    assert sharded - files == {name for name in sharded if name.startswith(("model-", "model.safetensors"))}
    assert commits(hub) == 3


def test_a_pull_request_leaves_the_branch_as_it_is(hub, folder):
    main = push_folder(folder, NAME).oid
    model = CMCRModel.from_pretrained(folder)
    with torch.no_grad():
        model.connector.logit_scale += 1
    commit = model.push_to_hub(NAME, create_pr=True)
    repository = hub.repositories[NAME]
    assert (repository.head, repository.refs["refs/pr/1"]) == (main, commit.oid)
    assert commit.pr_url == f"{hub.url}/{NAME}/discussions/1"


def test_a_connector_alone_is_pushed_without_its_sources(hub, tmp_path):
    connector = CMCRConnector(CMCRConfig(projection_dim=8, projectors={"clip": {"input_dim": 4}}, bridges=[]))
    connector.push_to_hub(NAME, private=True)
    assert hub.repositories[NAME].hidden
    assert load(hub.repositories[NAME].files["model.safetensors"]).keys() == connector.state_dict().keys()


def test_trainer_pushes_a_connector_with_its_tags_in_the_card(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub.hf_api", huggingface_hub.HfApi)
    monkeypatch.setattr("transformers.trainer.hf_api", huggingface_hub.HfApi)
    connector = CMCRConnector(CMCRConfig(projection_dim=8, projectors={"clip": {"input_dim": 4}}, bridges=[]))
    arguments = TrainingArguments(str(tmp_path / "run"), hub_model_id=NAME, report_to=[], use_cpu=True)
    Trainer(connector, arguments).push_to_hub()
    files = hub.repositories[NAME].files
    assert load(files["model.safetensors"]).keys() == connector.state_dict().keys()
    assert {"modeling_cmcr.py", "config.json"} <= files.keys()
    assert {"c-mcr", "cmcr_hf"} <= set(ModelCard(files["README.md"].decode()).data.tags)


def test_the_stand_in_for_the_hub_keeps_branches_tags_and_trees_as_the_client_expects(hub, folder):
    head = push_folder(folder, NAME).oid
    api = huggingface_hub.HfApi()
    api.create_branch(NAME, branch="v2", revision="main")
    api.create_tag(NAME, tag="v1", revision="v2")
    refs = api.list_repo_refs(NAME)
    assert {ref.name: ref.target_commit for ref in [*refs.branches, *refs.tags]} == dict.fromkeys(
        ("main", "v2", "v1"), head
    )
    assert set(api.list_repo_files(NAME, revision="v1")) == set(hub.repositories[NAME].files)
    top = {entry.path for entry in api.list_repo_tree(NAME)}
    assert {"config.json", "clap_tokenizer"} <= top
    assert not any("/" in path for path in top)
    assert {entry.path for entry in api.list_repo_tree(NAME, "clap_tokenizer")} == {
        f"clap_tokenizer/{path.name}" for path in (folder / "clap_tokenizer").iterdir()
    }
    [weights] = api.get_paths_info(NAME, ["model.safetensors"])
    assert weights.lfs.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert api.whoami()["name"] == "org"
    for token in (False, READER):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("org/nothing", token=token)
    hub.repositories[NAME].gated = True
    assert api.model_info(NAME, token=READER).sha == head
    with pytest.raises(GatedRepoError):
        api.list_repo_files(NAME, token=READER)


def test_the_command_prints_the_address_of_the_commit(hub, folder, capsys):
    assert main(["push", str(folder), NAME, "--revision", "v2", "--private"]) == 0
    repository = hub.repositories[NAME]
    assert capsys.readouterr().out == f"{hub.url}/{NAME}/commit/{repository.refs['v2']}\n"
    assert repository.hidden
    assert list(repository.files) == [".gitattributes"]


def test_the_command_says_in_one_line_what_is_missing(hub, folder, capsys):
    (folder / "README.md").unlink()
    assert main(["push", str(folder), NAME]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cmcr push: {folder} has no model card. Write {folder / 'README.md'}")
