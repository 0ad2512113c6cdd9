"""COCO's annotations of 2014 in small, and tables of synonyms."""

import json

SYNONYMS = (
    "person, man, woman, people, child\ncar, bus\ndog, puppy\nchair, seat\ntoilet\n"
    "motorcycle,  motor bike, scooter\ntie, bow tie\nwine glass\ndining table, table\nTV\n"
)
NAMES = [line.split(",")[0] for line in SYNONYMS.splitlines()]


def make_coco(folder, images):
    """Writes the four files, and both tables of synonyms.

    Args:
      folder: where to.
      images: id -> (classes with masks, reference captions); every other one is of val.
    """
    folder.mkdir(exist_ok=True)
    (folder / "synonyms.txt").write_text(SYNONYMS)
    (folder / "synonyms_refine.txt").write_text(SYNONYMS)
    for place, split in enumerate(("train", "val")):
        chosen = dict(list(images.items())[place::2])
        masks = [
            {"image_id": image, "category_id": NAMES.index(name) + 1}
            for image, (classes, _) in chosen.items()
            for name in classes
        ]
        captions = [
            {"image_id": image, "caption": caption}
            for image, (_, references) in chosen.items()
            for caption in references
        ]
        names = [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
        listed = {"images": [{"id": image} for image in chosen]}
        for kind, rows in (("instances", masks), ("captions", captions)):
            content = {**listed, "annotations": rows, "categories": names}
            (folder / f"{kind}_{split}2014.json").write_text(json.dumps(content))
    return folder
