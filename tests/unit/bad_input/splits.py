"""Good samples that do not go together, and settings that do not go with them or with each other."""

from tests.unit.bad_input.dataset import B, D, case, file, gone, nothing, put

SPLITS = [
    case(
        "a subject in two splits",
        put("metadata.subject_id", "a", name="validation.jsonl"),
        f"{D}subject_id: a is also in data.train, at train.jsonl:1; split by subject, or the score means nothing",
    ),
    case(
        "a held-out subject as a reference",
        put("metadata.reference_id", "d"),
        f"{D}subject_id: d is also in data.train, at train.jsonl:2; split by subject, or the score means nothing",
    ),
    case(
        "nothing after the filters",
        nothing,
        "data.validation: none of its 2 conversations is left after data.task_filter='^[ab]'; ...",
        "data.task_filter=^[ab]",
    ),
    case(
        "no validation data",
        nothing,
        "data.validation is not set: name the conversations that choose the best trial",
        "data.validation=",
    ),
    case(
        "more in quarantine than allowed",
        gone("b.nii"),
        f"{B}image_path: b.nii does not exist; see ...\n"
        "1 of 4 samples cannot be used, more than data.max_bad_fraction=0.05; repair them, or raise that",
        "data.on_bad=quarantine",
    ),
    case(
        "a file in doubt is not quarantined",
        file("more.jsonl", ""),
        "more.jsonl: is empty; write a conversation into it or leave it out",
        *("data.train=[DATA/train.jsonl, DATA/more.jsonl]", "data.on_bad=quarantine", "data.max_bad_fraction=1"),
    ),
    case(
        "a whole split in quarantine",
        gone("a.nii", "b.nii"),
        "train.jsonl:1: image_path: 2 files below ... do not exist, first a.nii, b.nii; data.path_map={...: ...}...\n"
        "data.train: holds no conversation that can be used",
        *("data.on_bad=quarantine", "data.max_bad_fraction=1"),
    ),
]

SETTINGS = [
    case("unknown", nothing, "data.tran: there is no such setting; did you mean data.train?", "data.tran=x"),
    case(
        "an unknown format",
        nothing,
        "data.format='sharegpt': ... 'auto', 'v2', 'v1', 'llava' or 'chat'",
        "data.format=sharegpt",
    ),
    case(
        "not a regular expression",
        nothing,
        "data.task_filter='a(b': not a regular expression: missing ), ...",
        "data.task_filter=a(b",
    ),
    case(
        "a patch that does not divide",
        nothing,
        "modalities.sMRI: patch (3, 4, 4) does not divide grid (4, 4, 4) along every axis",
        "modalities.sMRI.patch=[3, 4, 4]",
    ),
    case(
        "spacing without its number",
        nothing,
        "modalities.sMRI: spacing, in millimetres, belongs to fit: spacing; give both or neither",
        "modalities.sMRI.fit=spacing",
    ),
    case(
        "a modality without patch",
        nothing,
        "modalities.PET.patch: is missing; give it with the rest of its section",
        "modalities.PET.grid=[4, 4, 4]",
    ),
]
