"""The 80 COCO objects and the terms that CHAIR counts for each; `COCO` finds them as CHAIR does.

What it is: data, and the variant `original`: the vocabulary of Rohrbach et al. (2018, arXiv
1809.02156) under the singularisation their script uses, quirks included, so that numbers compare
with published ones. What it is not: a good English lexicon. It does not see "bus", "ties" or
"canoes" (`READ_AS`), reads no hyphenated word, and takes every "orange" for a fruit. The other
variants, and one with these bugs mended, are in `variants`.

    score(rows, objects, lexicon=COCO)

The term lists are those of jiasenlu/NeuralBabyTalk (`coco_class_name.txt`), edited to CHAIR's
choice:

    Copyright (c) 2017 Jiasen Lu. MIT License. Permission is hereby granted, free of charge, to
    any person obtaining a copy of this software and associated documentation files (the
    "Software"), to deal in the Software without restriction, including without limitation the
    rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of
    the Software, and to permit persons to whom the Software is furnished to do so, subject to
    the following conditions: The above copyright notice and this permission notice shall be
    included in all copies or substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS
    IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
    WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO
    EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
    LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
    CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

from collections.abc import Iterable

from .lexicon import Lexicon, surface_forms

__all__ = ["CATEGORIES", "COCO", "COMPOUNDS", "NEVER_FOUND", "READ_AS", "compounds_of", "original"]


def _rows(text: str) -> dict[str, list[str]]:
    """`category: term, term` lines; a line that starts with a blank continues the one before."""
    rows = text.strip().replace("\n ", " ").split("\n")
    split = (row.split(":", 1) for row in rows)
    return {
        category: [t.strip() for t in terms.split(",") if t.strip()] for category, terms in split
    }


CATEGORIES: dict[str, list[str]] = _rows("""
person: girl, boy, man, woman, kid, child, chef, baker, people, adult, rider, children, baby,
  worker, passenger, sister, biker, policeman, cop, officer, lady, cowboy, bride, groom, male,
  female, guy, traveler, mother, father, gentleman, pitcher, player, skier, snowboarder, skater,
  skateboarder, foreigner, caller, offender, coworker, trespasser, patient, politician, soldier,
  grandchild, serviceman, walker, drinker, doctor, bicyclist, thief, buyer, teenager, student,
  camper, driver, solider, hunter, shopper, villager
bicycle: bike, unicycle, minibike, trike
car: automobile, van, minivan, sedan, suv, hatchback, cab, jeep, coupe, taxicab, limo, taxi
motorcycle: scooter, motor bike, motor cycle, motorbike, moped
airplane: jetliner, plane, air plane, monoplane, aircraft, jet, airbus, biplane, seaplane
bus: minibus, trolley
train: locomotive, tramway, caboose
truck: pickup, lorry, hauler, firetruck
boat: ship, liner, sailboat, motorboat, dinghy, powerboat, speedboat, canoe, skiff, yacht, kayak,
  catamaran, pontoon, houseboat, vessel, rowboat, trawler, ferryboat, watercraft, tugboat, schooner,
  barge, ferry, sailboard, paddleboat, lifeboat, freighter, steamboat, riverboat, battleship,
  steamship
traffic light: street light, traffic signal, stop light, streetlight, stoplight
fire hydrant: hydrant
stop sign:
parking meter:
bench: pew
bird: ostrich, owl, seagull, goose, duck, parakeet, falcon, robin, pelican, waterfowl, heron,
  hummingbird, mallard, finch, pigeon, sparrow, seabird, osprey, blackbird, fowl, shorebird,
  woodpecker, egret, chickadee, quail, bluebird, kingfisher, buzzard, willet, gull, swan, bluejay,
  flamingo, cormorant, parrot, loon, gosling, waterbird, pheasant, rooster, sandpiper, crow, raven,
  turkey, oriole, cowbird, warbler, magpie, peacock, cockatiel, lorikeet, puffin, vulture, condor,
  macaw, peafowl, cockatoo, songbird
cat: kitten, feline, tabby
dog: puppy, beagle, pup, chihuahua, schnauzer, dachshund, rottweiler, canine, pitbull, collie, pug,
  terrier, poodle, labrador, doggie, doberman, mutt, doggy, spaniel, bulldog, sheepdog, weimaraner,
  corgi, cocker, greyhound, retriever, brindle, hound, whippet, husky
horse: colt, pony, racehorse, stallion, equine, mare, foal, palomino, mustang, clydesdale, bronc,
  bronco
sheep: lamb, goat, ram, ewe
cow: cattle, oxen, ox, calf, holstein, heifer, buffalo, bull, zebu, bison
elephant:
bear: panda
zebra:
giraffe:
backpack: knapsack
umbrella:
handbag: wallet, purse, briefcase
tie: bow, bow tie
suitcase: suit case, luggage
frisbee:
skis: ski
snowboard:
sports ball: ball
kite:
baseball bat:
baseball glove:
skateboard:
surfboard: longboard, skimboard, shortboard, wakeboard
tennis racket: racket
bottle:
wine glass:
cup:
fork:
knife: pocketknife, knive
spoon:
bowl: container
banana:
apple:
sandwich: burger, sub, cheeseburger, hamburger
orange:
broccoli:
carrot:
hot dog:
pizza:
donut: doughnut, bagel
cake: cheesecake, cupcake, shortcake, coffeecake, pancake
chair: seat, stool
couch: sofa, recliner, futon, loveseat, settee, chesterfield
potted plant: houseplant
bed:
dining table: table, desk
toilet: urinal, commode, lavatory, potty
tv: monitor, televison, television
laptop: computer, notebook, netbook, lenovo, macbook, laptop computer
mouse:
remote:
keyboard:
cell phone: mobile phone, phone, cellphone, telephone, phon, smartphone, iPhone
microwave:
oven: stovetop, stove, stove top oven
toaster:
sink:
refrigerator: fridge, freezer
book:
clock:
vase:
scissors:
teddy bear: teddybear
hair drier: hairdryer
toothbrush:
""")
"""COCO category -> its further terms (the category itself is always a term)."""

_YOUNG_OR_GROWN = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
COMPOUNDS = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _YOUNG_OR_GROWN},
    "bow tie": "tie",
    "home plate": "home plate",
    "motor bike": "",
    "passenger jet": "jet",
    "passenger train": "train",
    "toilet seat": "toilet",
    "train track": "train track",
    "wine glas": "wine glass",
}
"""Two words read as one. What they give need not be an object: no train stands on "train track"."""

NEVER_FOUND = {"cheesecake", "iPhone", "motor bike", "stove top oven"}
"""Listed terms that the published scripts cannot find."""

NEVER_JOINED = {"dining table"}
"""Listed terms that are found by their last word only: "dining table" by "table"."""

READ_AS: dict[str, str | None] = {
    "airbus": None,
    "airbuses": "bus",
    "bus": None,
    "buses": "bus",
    "canoes": None,
    "collies": None,
    "children": "child",
    "childrens": "children",
    "doggies": None,
    "glas": None,
    "glass": "glas",
    "glasses": "glass",
    "kine": "cow",
    "knives": "knife",
    "magpies": None,
    "minibus": None,
    "minibuses": "bus",
    "oxen": "ox",
    "people": "person",
    "peoples": "people",
    "scissors": "scissors",
    "ski": "ski",
    "skis": "ski",
    "sports": None,
    "tennis": None,
    "thieves": None,
    "ties": None,
}
"""Spellings that CHAIR's singularisation reads in its own way (None: as no term at all)."""


def compounds_of(terms: Iterable[str]) -> dict[str, str]:
    """The published table of two words read as one."""
    joined = {term: term for term in terms if " " in term and term not in NEVER_JOINED}
    return joined | COMPOUNDS


def original() -> Lexicon:
    """Tables of the variant `original`; a word of a term is found as itself and in its plurals."""
    terms = {t: c for c, more in CATEGORIES.items() for t in (c, *more) if t not in NEVER_FOUND}
    compounds = compounds_of(terms)
    singulars = sorted({word for term in (*terms, *compounds) for word in term.split()})
    forms = {
        form: singular
        for singular in singulars
        if singular not in READ_AS
        for form in (*surface_forms(singular), singular + "s")
    }
    forms = {form: read for form, read in (forms | READ_AS).items() if read is not None}
    return Lexicon("original", terms, forms, compounds, {"seat": "toilet"}, splits_compounds=False)


COCO = original()
