"""Text that is not UTF-8: refused, with the encoding where the bytes can tell it. Only what is sure enough is named."""

from __future__ import annotations

from pathlib import Path

from accord.errors import DataError

__all__ = ["refuse_other_encodings"]

# In running Chinese about half of the characters are among these, in another script read as Chinese about one in
# twenty. So they tell Chinese from bytes that can be decoded as Chinese, as nearly all EUC-KR and much KOI8-R can.
_COMMON = frozenset(
    "的一是不了在人有我他这個个们們中来來上大为為和国國地到以说說时時要就出会會可也你妳对對生能而子那得于於着著下自之年"
    "过過发發后後作里裡用道行所然家种種事成方多经經么麼去法学學如都同现現当當没沒动動面起看定天分还還进進好小部其些主样樣理"
    "心她本前开開但因只从從想实實日者意无無力它与與长長把机機十第公此已工使情明性知全三又关關点點正业業外将將两兩高间間由"
    "问問很最重并物手应應向头頭文体體政美相见見什二等吗嗎请請哪谁誰几幾做给給名字题題答每世界您让讓吧呢谢謝语語写寫话話"
    "何少提供建议議解释釋描述列举舉句章变變化算计計较較比例市类類食术術数數据據信息网網络絡气氣环環境"
)
_CHINESE = (("GB18030", "gb18030"), ("BIG5", "big5"))
_MOSTLY, _COMMON_SHARE, _COMMON_CHARACTERS, _KANA_SHARE = 0.9, 0.2, 2, 0.3


def refuse_other_encodings(path: Path, head: bytes, *, whole: bool) -> None:
    """Raise DataError when the first bytes of a file (`whole`: all of it) show that its text is not UTF-8."""

    def refuse(name: str) -> None:
        raise DataError(f"{path}: the text is {name}, not UTF-8. {_advice(path, name)}")

    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        refuse("UTF-32")
    half = len(head) // 2
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (
        half > 8 and max(head[::2].count(0), head[1::2].count(0)) > 0.6 * half
    ):
        refuse("UTF-16")
    lines = head.split(b"\n")[: None if whole else -1]
    foreign = [(number, line) for number, line in enumerate(lines, 1) if not line.isascii()]
    faults = [_fault(line) for _, line in foreign]
    if not foreign or None in faults:
        return
    name = _chinese_encoding(b"\n".join(line for _, line in foreign))
    # One bad line in a good file is that row's problem; a file with no good line at all is another encoding.
    if name is None and len(foreign) == 1 and head.count(b"\n") > 1:
        return
    (number, line), column = foreign[0], faults[0] or 0
    where = f"{path}:{number}: byte {line[column]:#x} at column {column + 1} is not UTF-8"
    if name is None:
        raise DataError(f"{where}. Convert the file to UTF-8 from the encoding that it was written in.")
    raise DataError(f"{where}; the text is probably {name} (Chinese). {_advice(path, name)}")


def _advice(path: Path, name: str) -> str:
    return f"Convert it: iconv -f {name} -t UTF-8 {path.name} > new-file"


def _fault(line: bytes) -> int | None:
    """Where a line stops being UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def _chinese_encoding(text: bytes) -> str | None:
    """The encoding in which nearly all that is not ASCII is Chinese and enough of it common; None when neither is."""
    if _is_japanese(text):
        return None
    best, name = 0.0, None
    for candidate, codec in _CHINESE:
        foreign = [char for char in text.decode(codec, "replace") if not char.isascii()]
        common = [char for char in foreign if char in _COMMON]
        share = len(common) / len(foreign)
        mostly = sum(map(_is_chinese, foreign)) >= _MOSTLY * len(foreign)
        if mostly and len(set(common)) >= _COMMON_CHARACTERS and share >= max(_COMMON_SHARE, best):
            best, name = share, candidate
    return name


def _is_japanese(text: bytes) -> bool:
    """EUC-JP with its kana, which are common Chinese characters in Big5."""
    try:
        foreign = [char for char in text.decode("euc_jp") if not char.isascii()]
    except UnicodeDecodeError:
        return False
    return sum("぀" <= char <= "ヿ" for char in foreign) > _KANA_SHARE * len(foreign)


def _is_chinese(char: str) -> bool:
    """A Chinese character or the punctuation that stands between them."""
    return "一" <= char <= "鿿" or "\u3000" <= char <= "\u303f" or "\uff00" <= char <= "\uffef" or char in "—‘’“”…·"
