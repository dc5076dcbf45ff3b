"""A config is right as a whole, or refused in one line that names the file, the key, the value and the fix."""

import os
import re
from pathlib import Path

import pytest

from des_core import log, secrets
from des_core.config import MODELS, Config, load_config, parse_config
from des_core.errors import ConfigError
from des_core.secrets import without_secrets

BASE = """
[run]
name = "trial"
[source]
path = "logs/clicks.csv"
[[source.join]]
path = "films.csv"
on = "film"
[[fields]]
name = "user"
[[fields]]
name = "film"
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "configs" / "trial.toml"
    file.parent.mkdir()
    file.write_text(BASE, encoding="utf-8")
    return file


def fault(file: Path, *overrides: str) -> str:
    """The one line that refuses a config, without the file and the overrides that it begins with."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    origin = " ".join([str(file), *(f"--set {override}" for override in overrides)])
    return message.removeprefix(f"{origin}: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchh=3", "unknown key train.batchh; did you mean batch?"),
        ("trian.batch=3", "unknown key trian; did you mean train?"),
        ("optimizer.row.l2=1", "unknown key optimizer.row; did you mean rows?"),
        ("eval.zzz=1", "unknown key eval.zzz; known keys: tail"),
        ("fields.user.kindd=multi", "unknown key fields.user.kindd; did you mean kind?"),
        ("fields=[{nam='a'}]", "unknown key fields.0.nam; did you mean name?"),
        ("source.join.0.column=['a']", "unknown key source.join.0.column; did you mean columns?"),
    ],
)
def test_an_unknown_key_comes_with_a_suggestion(base: Path, override: str, message: str) -> None:
    assert fault(base, override) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch=many", 'train.batch = "many" must be a whole number'),
        ("train.batch=1.5", "train.batch = 1.5 must be a whole number"),
        ("train.batch=0", "train.batch = 0 must be at least 1"),
        ("train.lr_drop=2", "train.lr_drop = 2 must be at most 1"),
        ("train.shuffle=maybe", 'train.shuffle = "maybe" must be true or false'),
        ("train.precision=fp16", "train.precision = \"fp16\" must be 'fp32', 'fp64', 'tf32' or 'bf16'"),
        ("model.dropout=1", "model.dropout = 1 must be below 1"),
        ("model.hidden=64", "model.hidden = 64 must be a list"),
        ("model.hidden=[]", "model.hidden = [] must hold at least 1 value"),
        ("model.hidden=[64, 0]", "model.hidden.1 = 0 must be at least 1"),
        ("optimizer.rows.learning_rate=0", "optimizer.rows.learning_rate = 0 must be above 0"),
        ("optimizer.rows.learning_rate=inf", "optimizer.rows.learning_rate = Infinity must be a finite number"),
        ("run.name=Trial", 'run.name = "Trial" must match ^[a-z][a-z0-9-]*$'),
        ("run=7", "run = 7 must be a table"),
        ("fields.film.name=", 'fields.1.name = "" must not be empty'),
        ("source.header=maybe", 'source.header = "maybe" must be true or false or a list'),
        ("source.header=[1]", "source.header.0 = 1 must be text in quotes"),
        ("source.path=3", "source.path = 3 must be text in quotes or a list"),
        ("source.delimiter=;;", 'source.delimiter = ";;" must not be longer than 1'),
    ],
)
def test_a_wrong_value_is_told_with_what_it_must_be(base: Path, override: str, message: str) -> None:
    assert fault(base, override) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=deepfmm"], "model.name: unknown model 'deepfmm'; did you mean deepfm?"),
        (
            ["fields=[{name='user'}, {name='film'}, {name='both', cross=['user', 'fil']}]"],
            "fields.both.cross: there is no field 'fil'; did you mean film?",
        ),
        (
            [
                "fields=[{name='user'}, {name='film'}, {name='both', cross=['user', 'film']}, "
                "{name='all', cross=['both', 'user']}]"
            ],
            "fields.all.cross: both is a cross itself; name its parts, 'user', 'film'",
        ),
        (
            ["fields=[{name='user'}, {name='film', kind='numeric'}, {name='both', cross=['user', 'film']}]"],
            "fields.both.cross: film is a number; name fields with one value (kind = 'categorical')",
        ),
        (
            ["fields=[{name='user'}, {name='film', kind='multi'}, {name='both', cross=['user', 'film']}]"],
            "fields.both.cross: film is a list; name fields with one value (kind = 'categorical')",
        ),
        (
            ["fields=[{name='user'}, {name='film'}, {name='both', cross=['user', 'user']}]"],
            "fields.both: cross must name at least two fields, each once",
        ),
        (
            ["fields=[{name='user'}, {name='film'}, {name='both', cross=['user', 'film'], column='x'}]"],
            "fields.both: cross makes the value from other fields; remove column, which is for a column",
        ),
        (
            ["fields=[{name='user', wide=true}]"],
            "fields: all that own rows are wide; leave one at least for the rest of the model",
        ),
        (
            ["fields=[{name='user', wide=true, table='t'}, {name='film', table='t'}]"],
            "fields.film: shares a table with a wide field, read in part only; set wide = true for all fields of the "
            "table, or for none",
        ),
        (
            ["train.lr_schedule=step"],
            "train: lr_schedule = 'step' needs lr_decay_steps, after so many of which rates are multiplied",
        ),
        (["train.lr_decay_steps=9"], "train: lr_decay_steps needs lr_schedule = 'cosine' or 'step'"),
        (
            ["table.admit_count=2", "table.admit_probability=0.5"],
            "table: admit_count and admit_probability are two ways to admit; set one of them",
        ),
        (["table.idle_days=3"], "table.idle_days needs source.time, the column with the event's time"),
        (["fields.film.input=dense"], "fields.film: input = 'dense' needs kind = 'numeric', no buckets and no table"),
        (
            ["fields=[{name='a', kind='numeric', input='dense'}]"],
            "fields: all are dense inputs; at least one must own rows (input = 'rows')",
        ),
        (
            ["optimizer.rows.name=adamw", "optimizer.rows.weight_decay=100"],
            "optimizer.rows: learning_rate * weight_decay must be below 1: each step would take more than the weight",
        ),
        (["optimizer.rows.l1=1"], "optimizer.rows: l1 needs name = 'ftrl' or 'group_ftrl' (it is 'adam')"),
        (
            ["optimizer.rows.name=ftrl", "optimizer.rows.group_l1=1"],
            "optimizer.rows: group_l1 needs name = 'group_ftrl' (it is 'ftrl')",
        ),
        (["optimizer.dense.name=ftrl"], "optimizer: dense.name = 'ftrl' is for rows: use adagrad"),
        (["model.name=tree"], f"model.name: unknown model 'tree'; it is one of {', '.join(MODELS)}"),
        (["source.positive=high"], 'source.positive: \'high\' is not a comparison; write it like ">= 4" or "== click"'),
        (
            ["source.timezone=Mars"],
            "source.timezone: 'Mars' is not a time zone known here; write it like Europe/Berlin",
        ),
        (["source.train=a.csv"], "source: give either path, or train and test, not both"),
        (["source.path=", "source.train=a.csv"], "source: give path, or train and test"),
        (
            ["source.format=synthetic"],
            "source: format synthetic makes its own logs: remove path, train, valid and test",
        ),
        (["split.valid=1"], "split: valid = 1.0 must be a share between 0 and 1, or set by = 'day'"),
        (
            ["split.valid=0.5", "split.test=0.5"],
            "split: valid = 0.5 and test = 0.5 leave no rows to train on; make them smaller",
        ),
        (
            ["split.by=day", "split.test=0.1"],
            "split: test = 0.1 must be a number of days or a list of dates, or set by = 'random'",
        ),
        (["split.by=day", "split.test=June"], "split: test = 'June' must be a date like 2026-01-31"),
        (["split.by=day"], "split.by = 'day' needs source.time, or {day} in source.path"),
        (["split.by=time"], "split.by = 'time' needs source.time, the column with the event's time"),
        (["fields.user.transform=log1p"], "fields.user: transform needs kind = 'numeric'"),
        (["fields.user.kind=numeric", "fields.user.weight=w"], "fields.user: a numeric field takes no weight"),
        (["fields.user.derive=month"], "fields.user: derive is hour, weekday, year or regex:PATTERN"),
        (
            ["fields.user.derive=regex:("],
            "fields.user: bad pattern in derive: missing ), unterminated subpattern at position 0",
        ),
        (["fields.user.name=_row"], "fields._row: a name must not begin with _ or weight:; rename it and set column"),
        (["fields.film.name=user"], "fields: user is declared twice; give each field its own name"),
        (["fields=[]"], "fields: none declared; add [[fields]] tables (format csv has no own)"),
        (
            ["optimizer.rows.weight_decay=0.1"],
            "optimizer.rows: weight_decay needs name = 'adamw' (it is 'adam'); or use l2",
        ),
        (
            ["optimizer.dense.name=rowwise_adagrad"],
            "optimizer: dense.name = 'rowwise_adagrad' is for rows: use adagrad",
        ),
        (["train.workers=65"], "train.lanes = 64 must be at least train.workers = 65; raise it"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(base: Path, overrides: list[str], message: str) -> None:
    assert fault(base, *overrides) == message


def test_what_is_missing_is_named(base: Path) -> None:
    base.write_text("[run]\nname = 'trial'\n", encoding="utf-8")
    assert fault(base) == "source is missing; add it"
    base.write_text("[run]\n[source]\npath = 'a'\n", encoding="utf-8")
    assert fault(base) == "run.name is missing; add it"


def test_a_file_that_cannot_be_read_is_one_line(base: Path) -> None:
    assert fault(base.parent / "other.toml") == "no such config file"
    assert fault(base.parent).startswith("cannot be read as text")
    base.write_text("[run\n", encoding="utf-8")
    assert fault(base).startswith("not valid TOML: ")
    base.write_bytes(b"\xff\xfe")
    assert fault(base).startswith("cannot be read as text")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("split.valid=0.2", 0.2),
        ("train.workers=3", 3),
        ("train.shuffle=false", False),
        ("model.hidden=[8, 4]", (8, 4)),
        ("source.header=['a', 'b']", ("a", "b")),
        ("source.positive=>= 4", ">= 4"),
        ("source.positive=== click", "== click"),
        ("source.label=liked", "liked"),
        ("source.label='7'", "7"),
        ('source.delimiter="\\t"', "\t"),
        ("source.group=", ""),
        ("run.name=other", "other"),
        ("optimizer.rows.learning_rate=1e-2", 0.01),
    ],
)
def test_an_override_is_read_as_toml_or_else_as_text(base: Path, override: str, value: object) -> None:
    config: object = load_config(base, (override,))
    for word in override.partition("=")[0].split("."):
        config = getattr(config, word)
    assert config == value


def test_tables_of_a_list_are_named_or_counted(base: Path) -> None:
    config = load_config(base, ("fields.film.kind=multi", "fields.0.column=who", "source.join.0.on=id"))
    assert [(field.name, field.kind, field.column) for field in config.fields] == [
        ("user", "categorical", "who"),
        ("film", "multi", ""),
    ]
    assert config.source.join[0].on == "id"
    with pytest.raises(ConfigError, match=r"^--set fields.year.kind=multi: no 'year' there; it is one of user, film$"):
        load_config(base, ("fields.year.kind=multi",))
    with pytest.raises(ConfigError, match=r"no '1' there; it is one of 0$"):
        load_config(base, ("source.join.1.on=id",))


@pytest.mark.parametrize(
    "override", ["train.batch", "=3", "train.=3", ".batch=3", "run.name.first=a", "fields.kind=multi"]
)
def test_an_override_of_another_form_is_refused(base: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set "):
        load_config(base, (override,))


def test_later_overrides_win(base: Path) -> None:
    assert load_config(base, ("train.batch=2", "train.batch=4")).train.batch == 4


def test_a_day_may_be_a_toml_date(base: Path) -> None:
    base.write_text(BASE + "[split]\nby = 'day'\nvalid = [2026-01-02]\n", encoding="utf-8")
    config = load_config(base, ("source.path=logs/{day}.csv", "split.test=2026-01-03"))
    assert (config.split.valid, config.split.test) == (("2026-01-02",), "2026-01-03")


def test_days_are_counted_from_one(base: Path) -> None:
    split = load_config(base, ("split.by=day", "source.time=ts", "split.test=2")).split
    assert (split.valid, split.test) == (1, 2)


def test_paths_of_a_file_count_from_it_and_others_from_here(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = base.parent.parent / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    config = load_config(base)
    assert config.source.path == str(base.parent / "logs" / "clicks.csv")
    assert config.source.join[0].path == str(base.parent / "films.csv")
    assert config.run.dir == config.storage.root == str(here / "runs" / "trial")
    assert config.registry.tracking_uri == f"sqlite:///{here}/runs/trial/mlflow.db"
    config = load_config(
        base,
        (
            "source.path=['a/*.csv', '/b/{day}.csv', 's3://c/d']",
            "source.join.0.path=../side.csv",
            "run.dir=out",
            "storage.root=~/kept",
            "registry.tracking_uri=sqlite:///m.db",
        ),
    )
    assert config.source.path == (str(here / "a" / "*.csv"), "/b/{day}.csv", "s3://c/d")
    assert config.source.join[0].path == str(here.parent / "side.csv")
    assert config.run.dir == str(here / "out")
    assert config.storage.root == str(Path.home() / "kept")
    assert config.registry.tracking_uri == f"sqlite:///{here}/m.db"
    assert load_config(base, ("registry.tracking_uri=http://m:5000",)).registry.tracking_uri == "http://m:5000"


def test_variables_are_expanded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base.write_text(
        BASE.replace("logs/clicks.csv", "${CLICKS}/a.csv").replace('"trial"', '"${WHO}-1"'), encoding="utf-8"
    )
    monkeypatch.setenv("WHO", "ada")
    assert "environment variable CLICKS is not set" in fault(base)
    assert "export CLICKS=/path/to/folder" in fault(base)
    monkeypatch.setenv("CLICKS", "/data")
    config = load_config(base)
    assert (config.source.path, config.run.name) == ("/data/a.csv", "ada-1")
    # What a shell's variable holds was meant from where the shell stands.
    monkeypatch.setenv("CLICKS", "data")
    monkeypatch.chdir(base.parent.parent)
    assert load_config(base).source.path == str(base.parent.parent / "data" / "a.csv")


def test_any_model_takes_the_same_file(base: Path) -> None:
    assert len(MODELS) >= 4
    for name in MODELS:
        assert load_config(base, (f"model.name={name}", "model.hidden=[8]", "model.factors=4")).model.name == name


def test_the_resolved_config_travels_as_json(base: Path) -> None:
    config = load_config(base, ("split.by=day", "source.time=ts", "source.header=['a', 'ts']"))
    assert parse_config(config.model_dump_json()) == config
    with pytest.raises(ConfigError, match=r"^here: unknown key b"):
        parse_config('{"b": 1}', "here")
    with pytest.raises(ConfigError, match=r"^here: not valid JSON"):
        parse_config("{", "here")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://mlflow:p/w@ss:word@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("https://token@mlflow/base", "https://***@mlflow/base"),
        ("redis://:word@host", "redis://***@host"),
        ("postgresql:///mlflow?host=/run&password=word&x=1", "postgresql:///mlflow?host=/run&password=***&x=1"),
        ("refused 'http://a:word@b/c' and models:/shop@champion", "refused 'http://***@b/c' and models:/shop@champion"),
        ("https://t0ken@hooks.example.com/x", "https://***@hooks.example.com/x"),
        ("https://a.b/c?api_key=word&x=1;token=word", "https://a.b/c?api_key=***&x=1;token=***"),
        ("https://a.b/c?X-Amz-Signature=word&designer=me", "https://a.b/c?X-Amz-Signature=***&designer=me"),
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("s3://bucket/a@b/{day}.csv", "s3://bucket/a@b/{day}.csv"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
    ],
)
def test_passwords_of_addresses_are_not_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_the_recorded_config_is_the_config_without_passwords(base: Path) -> None:
    plain = load_config(base)
    assert plain.recorded == plain
    uri, hook = "registry.tracking_uri=http://a:word@mlflow", "notify.webhook=https://hooks/T0/word"
    config = load_config(base, (uri, hook))
    assert "word" not in config.recorded.model_dump_json()
    assert config.recorded.registry.tracking_uri == "http://***@mlflow"
    assert config.recorded.notify.webhook == "https://hooks/***"
    assert config.recorded.digest == config.digest


def test_digests_see_what_decides_and_nothing_else(base: Path) -> None:
    def digests(*overrides: str) -> tuple[str, str, str]:
        config: Config = load_config(base, overrides)
        return config.digest, config.features_digest, config.trajectory_digest

    plain = digests()
    assert digests("run.dir=elsewhere", "storage.root=s3://b", "registry.tracking_uri=http://m") == plain
    for judging in ("gate.min_auc=0.6", "gate.reference='3'", "recurring.wait_hours=2", "recurring.on_missing=fail"):
        assert digests(judging) == plain, judging
    bounds = {load_config(base, words).verdict_digest for words in ((), ("gate.min_auc=0.6",), ("gate.reference='3'",))}
    assert len(bounds) == 3
    assert [a == b for a, b in zip(digests("train.workers=2"), plain, strict=True)] == [False, True, True]
    assert [a == b for a, b in zip(digests("train.batch=8"), plain, strict=True)] == [False, True, False]
    assert [a == b for a, b in zip(digests("split.test=0.2"), plain, strict=True)] == [False, False, True]


@pytest.mark.parametrize("name", ["demo", "movielens", "criteo"])
def test_ready_configs_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DES_DATA", "/data")
    assert load_config(Path(__file__).parent.parent / "configs" / f"{name}.toml").run.name == name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gate.slices=['usr']", "gate.slices: there is no field 'usr'; did you mean user?"),
        ("gate.slices=['zzzzz']", "gate.slices: there is no field 'zzzzz'; fields: "),
        ("gate.slices=['user','user']", "slices: user is named twice; name each field once"),
        ("gate.min_calibration=3e9", "min_calibration = 3e+09 is above max_calibration = 1e+09; swap them"),
        ("gate.reference=@champion", "gate.reference"),
        ("gate.max_load=1.5", "gate.max_load = 1.5"),
        ("gate.on_schema_change=drop", "gate.on_schema_change"),
    ],
)
def test_bounds_that_cannot_be_meant_are_refused(base: Path, override: str, message: str) -> None:
    assert message in fault(base, override)


def test_slices_are_of_fields_with_values_and_of_clicks(base: Path) -> None:
    number = "fields=[{name='a'},{name='b',kind='numeric'}]"
    assert "gate.slices: b is a number" in fault(base, number, "gate.slices=['b']")
    assert "gate.slices compares AUCs" in fault(base, "source.task=rating", "gate.slices=['user']")


def test_a_config_without_secrets_gets_them_back(base: Path) -> None:
    uri, hook = "registry.tracking_uri=http://a:word@mlflow/?token=word2", "notify.webhook=https://hooks/T0/word?x=1"
    config = load_config(base, (uri, hook))
    assert config.secrets == {
        "registry.tracking_uri": "http://a:word@mlflow/?token=word2",
        "notify.webhook": "https://hooks/T0/word?x=1",
    }
    assert "word" not in config.recorded.model_dump_json()
    assert config.recorded.with_secrets(config.secrets) == config
    assert load_config(base).secrets == {}


def test_what_a_process_knows_to_be_secret_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh1")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("DES_WEBHOOK", "https://hooks.example.com/T1/from-the-environment")
    assert secrets.hidden("key abcdefgh1, abc") == "key ***, abc"
    assert "from-the-environment" not in secrets.hidden(os.environ["DES_WEBHOOK"])
    secrets.remember("https://hooks.example.com/services/T0/very-hidden")
    assert "very-hidden" not in secrets.hidden("POST /services/T0/very-hidden failed")
    assert "very-hidden" not in log.format_event(
        "x", why="cannot reach https://hooks.example.com/services/T0/very-hidden"
    )
    assert secrets.host_only("https://u:p@hooks.example.com/a/b?c") == "https://***@hooks.example.com/***"


@pytest.mark.parametrize("override", ["run.dir=/data/100%25", "storage.root=/data/a%2Fb"])
def test_a_folder_that_mlflow_would_misread_is_refused_before_anything_is_done(base: Path, override: str) -> None:
    assert "MLflow reads such a % as an escape; choose another folder" in fault(base, override)
    assert load_config(base, ("run.dir=/data/50% off",)).run.dir == "/data/50% off"
    assert load_config(base, ("storage.root=s3://bucket/a%20b",)).storage.root == "s3://bucket/a%20b"


def test_the_old_name_of_early_stop_means_the_new_one(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old = load_config(base, ("train.early_stop=auc",))
    assert "key=train.early_stop old=auc new=metric" in capfd.readouterr().err
    assert old.train.early_stop == "metric"
    assert old.digest == load_config(base).digest
    assert parse_config(old.model_dump_json()) == old
    assert "old=" not in capfd.readouterr().err, "what is written has the new name"


def test_expert_keys_are_listed_apart() -> None:
    page = (Path(__file__).parent.parent / "docs" / "config.md").read_text(encoding="utf-8")
    common, _, expert = page.partition("## Expert keys")
    keys = re.findall(r"^\| `(\w+\.\w+)` \|", expert, re.M)
    assert {"table.admit_probability", "table.budget_keeps", "train.upper", "train.lanes"} <= set(keys)
    assert {"train.bandwidth_mbps", "train.latency_us"} <= set(keys)
    for key in keys:
        assert f"| `{key.partition('.')[2]}` |" not in common.partition("## `[table]`")[0].partition("## `[train]`")[2]
