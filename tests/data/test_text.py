"""Annotation files in the encodings of other systems: read correctly or rejected, never as garbage."""

import json

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scripts import load_source
from data_scripts.text import ENCODINGS, read_text


PHRASES = {
    "gb18030": ["损坏的把手", "裂缝", "红色的汽车停在路边，前面有一个人", "轮胎", "左边的人"],
    "big5": ["損壞的把手", "裂縫", "紅色的汽車停在路邊，前面有一個人"],
    "cp932": ["壊れた取っ手", "ひび", "カップ", "左にいる赤い服の人", "亀裂"],
    "euc_jp": ["壊れた取っ手", "亀裂", "左にいる赤い服の人"],
    "cp949": ["부서진 손잡이", "균열", "왼쪽에 있는 빨간 옷을 입은 사람"],
    "cp1251": ["сломанная ручка", "ручка", "человек слева в красной куртке, трещина на стене"],
    "koi8_r": ["сломанная ручка", "человек слева в красной куртке, трещина на стене"],
    "cp1252": ["Tür", "poignée cassée", "Größe der Straße, Türgriff ist beschädigt", "the person’s café"],
    "cp1250": ["zlomená klika židle", "pęknięta rączka", "uszkodzona część samochodu, pęknięta rączka kubka"],
    "cp1254": ["kırık kulp şişe", "kırmızı arabanın yanındaki kişi"],
    "cp1253": ["σπασμένη λαβή", "ο άνθρωπος με τα κόκκινα ρούχα στα αριστερά"],
    "cp1255": ["ידית שבורה"],
    "cp1256": ["مقبض مكسور"],
    "cp1257": ["salauzts rokturis šķēle"],
    "cp874": ["ด้ามจับหัก"],
}
# Long enough to be certain.
DETECTED = ["gb18030", "big5", "cp932", "cp949", "cp1251", "cp1252", "cp1253", "cp1256"]


def write(path, encoding, *phrases):
    shapes = [{"label": phrase, "points": [[1, 1], [5, 1], [5, 5]]} for phrase in phrases]
    path.write_text(json.dumps({"imagePath": "a.png", "shapes": shapes}, ensure_ascii=False), encoding=encoding)
    return str(path)


def labels(text: str) -> list[str]:
    return [shape["label"] for shape in json.loads(text)["shapes"]]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_text_is_read_as_another(tmp_path, encoding):
    for phrases in ([phrase] for phrase in PHRASES[encoding]):
        path = write(tmp_path / "a.json", encoding, *phrases)
        assert labels(read_text(path, encoding)) == phrases
        try:
            assert labels(read_text(path)) == phrases
        except ValueError as error:
            assert "Save it in UTF-8, or set the option `encoding`" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("encoding", DETECTED)
def test_long_texts_are_detected(tmp_path, encoding):
    path = write(tmp_path / "a.json", encoding, *PHRASES[encoding])
    assert labels(read_text(path)) == PHRASES[encoding]


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]),
)
def test_unicode_is_read_in_every_form(tmp_path_factory, text, encoding):
    path = tmp_path_factory.getbasetemp() / "unicode.json"
    assert labels(read_text(write(path, encoding, text))) == [text]


def test_damaged_utf8_is_not_another_encoding(tmp_path):
    path = tmp_path / "a.json"
    content = bytearray('{"label": "损坏的把手 裂缝"}'.encode())
    content[13] = 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="UTF-8, got .*damaged"):
        read_text(str(path))


def test_sources_read_the_encoding_of_their_option(tmp_path):
    write(tmp_path / "a.json", "gbk", "裂缝")
    PIL.Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    options = {"builder": "labelme", "annotations": ".", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match="UTF-8"):
        load_source("mine", str(tmp_path), **options)
    rows = load_source("mine", str(tmp_path), **options, encoding="gbk")
    assert rows[0]["targets"][0]["phrases"] == ["裂缝"]


def test_json_lines_end_at_line_feeds_only(tmp_path):
    PIL.Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    mask = PIL.Image.new("L", (8, 6))
    mask.paste(1, (2, 2, 6, 5))
    mask.save(tmp_path / "m.png")
    question = "What is\u2028broken\x85here?"
    line = json.dumps({"image": "a.png", "mask": "m.png", "question": question}, ensure_ascii=False)
    (tmp_path / "q.jsonl").write_bytes(f"{line}\r\n{line}\r\n".encode("utf-8-sig"))
    options = {"builder": "image_folder", "questions": "q.jsonl", "images": ".", "masks": "."}
    rows = load_source("mine", str(tmp_path), cache_dir=str(tmp_path / "cache"), **options)
    assert [row["targets"][0]["phrases"] for row in rows] == [[question]] * 2
