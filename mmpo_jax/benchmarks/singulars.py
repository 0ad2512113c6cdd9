"""Singulars of English nouns as CHAIR's script finds them: by the rules of pattern.en 3.6.

They know no words, so they also shorten what is no plural ("bus" is "bu", "glass" is "glas") and
miss some plurals ("cookies", "ties"). The numbers of CHAIR depend on it. The rules are Bermi Ferrer
Martinez's and those of github.com/clips/pattern, pattern/text/en/inflect.py.
"""

from __future__ import annotations

import functools
import re


def _words(text: str) -> list[str]:
    return text.split()


UNCHANGED = frozenset(
    _words(
        """
    bison bream breeches britches carp chassis christmas clippers cod contretemps corps debris
    diabetes djinn eland elk flounder gallows georgia graffiti headquarters herpes high-jinks
    homework innings jackanapes mackerel measles mews mumps news pincers pliers proceedings
    rabies salmon scissors series shears species swine swiss trout tuna whiting wildebeest
    advice bread butter cheese electricity equipment fruit furniture garbage gravel happiness
    information ketchup knowledge love luggage mathematics mayonnaise meat mustard progress
    research rice sand software understanding water
    """
    )
)
"""They, and whatever one of them ends with, stay as they are."""

LEFT_AS_PLURALS = tuple(
    f"{word}s"
    for word in _words(
        """
    alergie auntie beanie birdie bogie bombie collie cookie cutie doggie eyrie freebie goonie
    groupie hankie hippie hoagie hottie indie junkie laddie laramie lingerie meanie newbie
    nightie oldie pixie quickie reverie rookie softie sortie stoolie sweetie techie toughie
    valkyrie veggie weenie yuppie zombie
    """
    )
)
"""Endings of words that were meant to lose their s, and keep it."""

IRREGULAR = dict(
    pair.split(":")
    for pair in _words(
        """
    atlantes:atlas atlases:atlas axes:axe beeves:beef brethren:brother children:child
    corpora:corpus corpuses:corpus ephemerides:ephemeris feet:foot ganglia:ganglion geese:goose
    genera:genus genii:genie graffiti:graffito helves:helve kine:cow leaves:leaf loaves:loaf
    men:man mongooses:mongoose monies:money moves:move mythoi:mythos numena:numen
    occipita:occiput octopodes:octopus opera:opus opuses:opus our:my oxen:ox penes:penis
    penises:penis people:person sexes:sex soliloquies:soliloquy teeth:tooth testes:testis
    trilbys:trilby turves:turf zoa:zoon
    """
    )
)
"""Endings and what they become."""

PREPOSITIONS = frozenset(
    _words(
        """
    about above across after among around at athwart before behind below beneath beside besides
    between betwixt beyond but by during except for from in into near of off on onto out over
    since till to under until unto upon with
    """
    )
)
"""Behind a hyphen they leave the word before it to be shortened: mothers-in-law."""

RULES = tuple(
    (re.compile(f"{ending}$"), becomes)
    for ending, becomes in (
        (r"(.)ae", r"\1a"),
        (r"(.)itis", r"\1itis"),
        (r"(.)eaux", r"\1eau"),
        (r"(quiz)zes", r"\1"),
        (r"(matr)ices", r"\1ix"),
        (r"(ap|vert|ind)ices", r"\1ex"),
        (r"^(ox)en(.*)", r"\1\2"),
        (r"(alias|status)es", r"\1"),
        (r"([octopvir|])i", r"\1us"),
        (r"(cris|ax|test)es", r"\1is"),
        (r"(shoe)s", r"\1"),
        (r"(o)es", r"\1"),
        (r"(bus)es", r"\1"),
        (r"([ml|])ice", r"\1ouse"),
        (r"(x|ch|ss|sh)es", r"\1"),
        (r"(m)ovies", r"\1ovie"),
        (r"(.)ombies", r"\1ombie"),
        (r"(s)eries", r"\1eries"),
        (r"([^aeiouy]|qu)ies", r"\1y"),
        (r"([aeo]l|[^d]ea)ves", r"\1f"),
        (r"arves", r"arf"),
        (r"erves", r"erve"),
        (r"([nlw]i)ves", r"\1fe"),
        (r"([lr])ves", r"\1f"),
        (r"([aeo])ves", r"\1ve"),
        (r"([sth]ive)s", r"\1"),
        (r"([^f])ves", r"\1fe"),
        (r"(^analy)ses", r"\1sis"),
        (r"((a)naly|(b)a|(d)iagno|(p)arenthe|(p)rogno|(s)ynop|(t)he)ses", r"\1\2sis"),
        (r"(.)opses", r"\1opsis"),
        (r"(.)yses", r"\1ysis"),
        (r"(h|d|r|o|n|b|cl|p)oses", r"\1ose"),
        (r"(fruct|gluc|galact|lact|ket|malt|rib|sacchar|cellul)ose", r"\1ose"),
        (r"(.)oses", r"\1osis"),
        (r"([ti])a", r"\1um"),
        (r"(n)ews", r"\1ews"),
        (r"s", r""),
    )
)
"""The first that fits is applied."""


@functools.lru_cache(maxsize=1 << 16)
def singular_by_rules(word: str) -> str:
    """What pattern.en's `singularize` makes of a word in lower case."""
    first, *rest = word.split("-")
    if rest and rest[0] in PREPOSITIONS:
        return "-".join([singular_by_rules(first), *rest])
    if word.endswith("'"):
        return singular_by_rules(word[:-1]) + "'s"
    if any(known.endswith(word) for known in UNCHANGED) or word.endswith(LEFT_AS_PLURALS):
        return word
    for ending, singular in IRREGULAR.items():
        if word.endswith(ending):
            return word.removesuffix(ending) + singular
    for rule, becomes in RULES:
        if rule.search(word):
            return rule.sub(becomes, word)
    return word
