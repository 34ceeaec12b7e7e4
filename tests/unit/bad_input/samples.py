"""Samples that are JSON, and no conversations."""

import json

from tests.unit.bad_input.dataset import ANSWER, IMAGE, TEXT, TURN, B, case, file, line, llava, put, put_path, sample

LABEL = "metadata.subject_label: must be a text or a finite number, not"

SAMPLES = [
    case("a number", line(3), f"{B}sample: must be an object {{...}}, not 3"),
    case("null", line("null"), f"{B}sample: must be an object {{...}}, not null"),
    case("a list", line([1]), f"{B}sample: must be an object {{...}}, not ..."),
    case(
        "of no format",
        line({"prompt": "Sex?", "completion": "male."}),
        f"{B}sample: has the keys prompt, completion, which is no known format; accepted are v2 ...",
    ),
    case(
        "no task_id",
        put("task_id", ...),
        f"{B}task_id: is missing; give every sample a name of its own in `task_id` or `id`",
    ),
    case("a task_id that is empty", put("task_id", ""), f"{B}task_id: is empty; give every sample a name of its own"),
    case(
        "a task_id with a line break",
        put("task_id", "b\nsex"),
        f"{B}task_id: 'b\\nsex' holds a line break or another control character; leave it out",
    ),
    case("no task_type", put("task_type", ...), f"{B}task_type: is missing; add it"),
    case("a task_type that is empty", put("task_type", ""), f"{B}task_type: is empty; name the task, as in T1"),
    case("no conversations", put("conversations", ...), f"{B}conversations: is missing; add it"),
    case(
        "no image list",
        put("images", ...),
        f"{B}images: the number of entries is 0, that of images in the turns is 1; list each of those once, ...",
    ),
    case("metadata is a number", put("metadata", 3), f"{B}metadata: must be an object {{...}}, not 3"),
    case("a label is a list", put("metadata.subject_label", ["male"]), f"{B}{LABEL} ['male']"),
    case("a label is too large a number", put("metadata.subject_label", 10**400), f"{B}{LABEL} 1000...000"),
    case("an empty label", put("metadata.subject_label", " "), f"{B}metadata.subject_label: is empty; write the ..."),
    case("a target is no text", put("metadata.target", True), f"{B}metadata.target: must be a text, not true"),
    case("a key twice", line('{"a": {"b": 1, "b": 2}}'), f"{B}holds the key 'b' twice in one object; keep one of ..."),
    case(
        "no question", put("conversations.0.role", "system"), f"{B}conversations: no user turn, ...; add the question"
    ),
    case(
        "a question without an answer",
        put("conversations", [*sample("b", "b.nii")["conversations"], {"role": "user", "content": "Age?"}]),
        f"{B}conversations: ends with a user turn that nothing answers; add the answer, or leave the turn out",
    ),
    case("a label is infinite", line(json.dumps(sample("b", "b.nii")).replace('"male"', "1e400")), f"{B}{LABEL} inf"),
    case(
        "a subject is a list",
        put("metadata.subject_id", ["b"]),
        f"{B}metadata.subject_id: must be a text or a number, not ['b']",
    ),
    case(
        "one of the subjects is null",
        put("subject_ids", ["b", None]),
        f"{B}subject_ids.1: must be a text or a number, not null",
    ),
    case("task_id is a number", put("task_id", 3), f"{B}task_id: must be a text, not 3"),
    case("images is a text", put("images", "b.nii"), f"{B}images: must be a list, not 'b.nii'"),
    case("an image is a text", put("images.0", "b.nii"), f"{B}images.0: must be an object {{...}}, not 'b.nii'"),
    case("content is a number", put(TURN, 3), f"{B}{TURN}: must be a text or a list of items, not 3"),
    case("no content", put(TURN, ...), f"{B}{TURN}: is missing; add it"),
    case("a path is a number", put(f"{IMAGE}.image_path", 3), f"{B}{IMAGE}.image_path: must be a text, not 3"),
    case("a listed path is a number", put("images.0.path", 3), f"{B}images.0.path: must be a text, not 3"),
    case("no path", put(f"{IMAGE}.image_path", ...), f"{B}{IMAGE}.image_path: is missing; add it"),
    case("a path is empty", put_path(""), f"{B}image_path: is empty; write the file's path"),
    case(
        "a path with a line break",
        put_path("b\n.nii"),
        f"{B}image_path: 'b\\n.nii' does not exist; see `data.root` and `data.path_map`",
    ),
    case("a text is a number", put(TEXT, 3), f"{B}{TEXT}: must be a text, not 3"),
    case(
        "a turn is a text",
        put("conversations.1", "male."),
        f"{B}conversations.1: must be an object {{...}}, not 'male.'",
    ),
    case(
        "an unknown role",
        put("conversations.1.role", "{bot}"),
        f"{B}conversations.1.role: '{{bot}}' is not known; use ...",
    ),
    case("no role", put("conversations.1.role", ...), f"{B}conversations.1.role: is missing; add it"),
    case(
        "an unknown item type",
        put("conversations.0.content.1.type", "video"),
        f"{B}conversations.0.content.1: {{...}} is of no known `type`; use text or image",
    ),
    case(
        "no item type",
        put("conversations.0.content.1.type", ...),
        f'{B}conversations.0.content.1: has no `type`; add "type": "text" or "type": "image"',
    ),
    case(
        "an image item without type",
        put(f"{IMAGE}.type", ...),
        f'{B}{IMAGE}: has no `type`; add "type": "text" or "type": "image"',
    ),
    case(
        "an unknown modality",
        put(f"{IMAGE}.modality", "PET", "images.0.modality", "PET"),
        f"{B}modality: 'PET' is not one of sMRI, dMRI, fMRI; correct it or add it to `modalities`",
    ),
    case(
        "fewer images than items", put("images", []), f"{B}images: the number of entries is 0, ... is 1; list each ..."
    ),
    case(
        "more images than items",
        put("images", sample("b", "b.nii")["images"] * 2),
        f"{B}images: the number of entries is 2, that of images in the turns is 1; list each of those once, ...",
    ),
    case(
        "paths differ",
        put("images.0.path", "a.nii"),
        f"{B}images.0.path: 'a.nii', but image 0 of the turns has 'b.nii'; they must be the same",
    ),
    case(
        "modalities differ",
        put("images.0.modality", "dMRI"),
        f"{B}images.0.modality: 'dMRI', but image 0 of the turns has 'sMRI'; they must be the same",
    ),
    case(
        "v2 tokens and images differ",
        put(TEXT, "<image><image> Sex?"),
        f"{B}conversations: the number of <image> in the texts is 2, that of image items is 1; there must be ...",
    ),
    case(
        "llava placeholders and images differ",
        llava("<image>\n<image>\nSex?", "b.nii", modality="sMRI"),
        f"{B}image: the number of files is 1, that of `<image>` placeholders is 2; there must be one for each",
    ),
    case(
        "chat placeholders and images differ",
        line(
            {
                "id": "b",
                "images": ["b.nii"],
                "messages": [{"role": "user", "content": "Sex?"}, {"role": "assistant", "content": "?"}],
            }
        ),
        f"{B}images: the number of files is 1, that of image items and `<image>` placeholders is 0; ... one for each",
    ),
    case(
        "llava without a modality",
        llava("<image>", "b.nii"),
        f"{B}modality: cannot be inferred from the file name 'b.nii'; add `modality` to the sample",
    ),
    case(
        "a web address in llava",
        llava("<image>", "https://b.org/b.nii", modality="sMRI"),
        f"{B}image_path: 'https://b.org/b.nii' is not a file; download it and write the file's path",
    ),
    case(
        "a web address in v2",
        put_path("https://b.org/b.nii"),
        f"{B}image_path: 'https://b.org/b.nii' is not a file; download it and write the file's path",
    ),
    case(
        "no turns",
        put("conversations", [], "images", []),
        f"{B}conversations: is empty; a sample needs a user turn and an assistant turn",
    ),
    case("no turns, but images", put("conversations", []), f"{B}conversations: is empty; a sample needs ..."),
    case("no answer", put("conversations.1.role", "user"), f"{B}conversations: no assistant turn, ...; add the answer"),
    case("an empty turn", put(ANSWER, ""), f"{B}{ANSWER}: is empty; write a text, or leave the turn out"),
    case("a turn without items", put(ANSWER, []), f"{B}{ANSWER}: is empty; write a text, or leave the turn out"),
    case("a sample twice in a file", line(sample("a", "a.nii")), f"{B}sample: is the same as ...:1; leave one out"),
    case(
        "a sample twice in two files",
        file("more.jsonl", json.dumps(sample("b", "b.nii"))),
        f"{B}sample: is the same as the one at more.jsonl:1; the same samples are in two files; name one",
        "data.train=[DATA/train.jsonl, DATA/more.jsonl]",
    ),
    case(
        "too many tokens",
        put(TEXT, "Sex? " * 100),
        f"{B}conversations: becomes 529 tokens, more than data.max_tokens=200; raise that, shorten the text or ...",
        "data.max_tokens=200",
    ),
]
