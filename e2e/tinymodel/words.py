"""The raw material of the generated text: common words, and invented ones that force copying."""

from __future__ import annotations

import random


def _words(block: str) -> tuple[str, ...]:
    return tuple(block.split())


NOUNS = _words(
    """
    apple arm bag ball bank basket beach bean bed bell bird boat book bottle bowl box bread bridge
    brother brush bucket bus butter button cake camera candle carpet castle cat chair cheese cherry
    church circle clock cloud coat coffee coin corner cotton cow cup curtain desk dinner dish dog
    door dream dress drum duck eagle ear earth egg elbow engine evening eye face family farm feather
    field finger fire fish flag floor flower fog forest fork friend frog fruit garden gate ghost
    giant glass glove goat grass guitar hammer hand hat heart hill honey horse hotel house ice
    island jacket jar jungle key kitchen kite knife ladder lake lamp leaf lemon letter library light
    lion lock machine map market meal melon milk mirror monkey moon morning mountain mouse museum
    music nail neck needle nest night nose notebook number ocean office onion orange oven owl page
    paint palace paper park party path peach pencil pepper piano picture pillow pilot planet plate
    pocket poem potato pumpkin queen question rabbit radio rain ribbon ring river road robot rock
    roof room rope rose sail salt sand school sea season shadow sheep ship shirt shoe shop silver
    sister sky sleep snow soap sock song soup spoon spring square star stone storm story street
    sugar summer sun table tail teacher tent theatre thread tiger tomato tower train tree tunnel
    umbrella uncle valley village violin voice wagon wall water wave wheel wind window winter wolf
    wood wool word world yard year
    """
)

OTHER_WORDS = _words(
    """
    the a my your this that every some one two three old new big small red green warm cold quick
    slow quiet bright dark kind happy brave tall short long round sweet fresh empty full and or but
    with without under over near behind before after into from at on in by walks runs sleeps sings
    opens closes finds keeps makes takes likes sees hears reads writes brings holds moves stands
    falls rises jumps waits is was never always often again today here there very
    """
)

NAMES = _words(
    """
    Ada Adam Alan Alice Amir Anna Anton Aria Ben Bella Boris Carla Cesar Chen Clara Daniel Daria
    David Diana Diego Elena Elias Ella Emil Emma Erik Eva Felix Fiona Frank George Grace Greta Hana
    Hassan Helen Henry Hugo Ida Igor Ines Iris Isaac Ivan Jack Jana Jonas Julia Kai Karen Karl Kira
    Lara Laura Leo Lena Liam Lina Linus Lucas Lucy Lydia Mara Marco Maria Max Mei Mia Milo Mina
    Nadia Nina Noah Nora Oliver Olga Omar Oscar Otto Paul Pedro Petra Priya Quinn Ravi Rita Robert
    Rosa Ruth Sam Sara Simon Sofia Stella Tara Theo Tina Tom Ursula Vera Victor Viktor Walter Wendy
    Yara Yusuf Zara Zoe
    """
)

CITIES = _words(
    """
    Accra Amsterdam Ankara Athens Baku Bangkok Barcelona Basel Beirut Bergen Berlin Bern Bogota
    Boston Bremen Bristol Brussels Budapest Cairo Chicago Cologne Copenhagen Dakar Dallas Delhi
    Denver Dresden Dublin Florence Geneva Ghent Glasgow Hamburg Hanoi Havana Helsinki Istanbul
    Jakarta Kyoto Lagos Lima Lisbon London Lyon Madrid Manila Miami Milan Montreal Mumbai Munich
    Nairobi Naples Osaka Oslo Oxford Paris Porto Prague Quito Riga Rome Santiago Seoul Seville
    Sofia Stockholm Sydney Tallinn Tokyo Toronto Tunis Turin Utrecht Valencia Venice Vienna Vilnius
    Warsaw Zagreb Zurich
    """
)

COLOURS = _words(
    """
    amber beige black blue bronze brown copper coral crimson cyan gold grey green indigo ivory
    lavender lilac magenta maroon mint navy olive orange pink purple red ruby salmon scarlet silver
    tan teal turquoise violet white yellow
    """
)

PETS = _words(
    """
    beagle budgie canary cat chicken chinchilla cockatoo collie dog donkey duck ferret finch frog
    gecko gerbil goat goldfish goose guppy hamster hare hedgehog horse kitten lamb lizard llama
    mouse newt owl parrot pigeon pony poodle puppy rabbit rat sheep snail snake spider terrier toad
    tortoise turtle
    """
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ONSETS = _words("b c d f g h j k l m n p r s t v w y z br cl dr fl gr pl sh st th tr ch qu")
VOWELS = _words("a e i o u ai ea ee oo ou")
CODAS = ("", "", "", "n", "r", "s", "t", "l", "m", "ck", "nd", "st", "x")


def invented_word(rng: random.Random) -> str:
    """A pronounceable word of one to four syllables that need not exist."""
    syllables = (
        rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        for _ in range(rng.choice((1, 2, 2, 3, 3, 4)))
    )
    return "".join(syllables)


def letter_string(rng: random.Random) -> str:
    """Three to nine letters in no order, so that every token of the vocabulary gets spelled."""
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 9)))


def any_word(rng: random.Random) -> str:
    """A lower-case word: common, compound, invented, or plain letters in no order."""
    draw = rng.random()
    if draw < 0.4:
        return rng.choice(NOUNS)
    if draw < 0.5:
        return rng.choice(OTHER_WORDS)
    if draw < 0.65:
        return compound(rng)
    return invented_word(rng) if draw < 0.9 else letter_string(rng)


def compound(rng: random.Random) -> str:
    """Two words as one: a common word may be one token, which must be met inside other words.

    Without compounds the letters of such a token could not be learned when its word is held out.
    """
    first = rng.choice(NOUNS + OTHER_WORDS + NAMES + CITIES + COLOURS + PETS)
    return (first + rng.choice(NOUNS)).lower()


def cased_word(rng: random.Random) -> str:
    """Any word, or a proper noun, as it could stand in a sentence: sometimes with capitals."""
    draw = rng.random()
    if draw < 0.1:
        return rng.choice(NAMES + CITIES)
    word = any_word(rng)
    if draw < 0.2:
        return word.capitalize()
    return word.upper() if draw < 0.23 and len(word) < 6 else word
