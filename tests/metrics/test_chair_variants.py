"""CHAIR's variants on sentences that they read differently, and `opera` over a scripted tagger."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.metrics.chair import opera as opera_words
from firsthand.metrics.chair import scoring as chair
from firsthand.metrics.chair.variants import choose_lexicon, fixed, opera

OBJECTS = {1: ["dog"]}
WITHOUT_DATA = [name for name in chair.VARIANTS if name != "opera"]


def row(text):
    return [{"id": 1, "image_id": 1, "prediction": text}]


def nodes(variant, text):
    return [mention.node for mention in chair.lexicon_for(variant).mentions(text)]


def tools(tags, lemmas):
    """A tokenizer, tagger and lemmatiser that follow a script; unknown words stay as they are."""

    def tokenize(text):
        return text.replace(".", " .").replace(",", " ,").replace('"', " `` ").split()

    def tag(tokens):
        return [(token, tags.get(token, "NN")) for token in tokens]

    def lemmatize(token, pos):
        return lemmas.get((token, pos), token)

    return tokenize, tag, lemmatize


SCRIPT = tools(
    tags={"seated": "VBN", "skiing": "VBG", "dogs": "NNS", "umbrellas": "VBZ", "Three": "CD"},
    lemmas={
        ("seated", "v"): "seat",
        ("skiing", "v"): "ski",
        ("dogs", "n"): "dog",
        ("umbrellas", "n"): "umbrella",
        ("hot", "n"): "hot",
    },
)


def test_variants_are_listed_and_found_by_name():
    assert chair.VARIANTS == ("original", "opera", "sima", "objhal", "fixed")
    assert chair.lexicon_for("original") is chair.COCO
    for name in WITHOUT_DATA:
        assert chair.lexicon_for(name).name == name
    assert len({chair.lexicon_for(name).hash for name in WITHOUT_DATA}) == 4
    with pytest.raises(ValueError, match="'chair' is no CHAIR variant. Choose one of original"):
        chair.lexicon_for("chair")


def test_a_variant_and_a_lexicon_do_not_go_together():
    own = chair.lexicon_from_nouns(["dog"], name="mine")
    assert choose_lexicon(own, "original") is own
    sima = chair.lexicon_for("sima")
    assert choose_lexicon(sima, "sima") is sima
    with pytest.raises(ValueError, match="'sima' brings a lexicon, and 'mine' was given too"):
        chair.score(row("a dog"), OBJECTS, own, variant="sima")


@pytest.mark.parametrize(
    ("text", "original", "sima"),
    [
        ("A bus.", [], ["bus"]),
        ("Two men and a woman.", ["person"] * 2, ["person"]),  # WordNet has a noun "men"
        ("Three vases.", ["vase"], []),  # the shortest lemma of "vases" is "vas"
        ("Ties and smartphones.", ["cell phone"], ["tie"]),  # WordNet has no smartphone
        ("Geese, mice, knives.", ["bird", "mouse", "knife"], ["bird", "mouse", "knife"]),
        ("A wine glass and two wine glasses", ["wine glass"] * 2, ["wine glass"] * 2),
        ("A motor bike.", [], []),
    ],
)
def test_sima_takes_singulars_from_wordnet(text, original, sima):
    assert (nodes("original", text), nodes("sima", text)) == (original, sima)


def test_sima_counts_repeats_of_a_hallucinated_word_once():
    text = "A cat, a cat, a kitten, a dog and a dog."
    result = chair.score(row(text), OBJECTS, variant="sima", details=True)
    assert (result["n_hallucinated"], result["n_mentions"]) == (2, 5)  # cat, kitten of five
    assert result["chair_i"] == 2 / 5
    assert result["captions"][0]["hallucinated"] == [True, True, True, False, False]
    assert chair.score(row(text), OBJECTS)["chair_i"] == 3 / 5
    assert (result["variant"], result["chair_s"]) == ("sima", 1.0)


def test_objhal_counts_words_once_and_captions_that_name_an_object():
    rows = [
        {"id": 1, "image_id": 1, "prediction": "A cat, a cat, a dog, two dogs and a puppy."},
        {"id": 2, "image_id": 1, "prediction": "A sunny day."},
        {"id": 3, "image_id": 1, "prediction": "The dog."},
    ]
    result = chair.score(rows, OBJECTS, variant="objhal", details=True)
    assert result["captions"][0]["words"] == ["cat", "dog", "puppy"]
    assert (result["n_hallucinated"], result["n_mentions"]) == (1, 4)
    assert (result["chair_s"], result["correct_rate"]) == (1 / 2, 1 / 2)  # one says no object
    assert result["obj_rec"] == result["recall"] == 2 / 3
    assert (result["n_captions"], result["n_silent"]) == (3, 1)
    columns = chair.pairs(rows, OBJECTS, variant="objhal")
    for name, column in columns.items():
        assert column[:, 0].sum() / column[:, 1].sum() == result[name]


def test_objhal_has_the_refined_terms():
    text = "A brother at a coffee table, a remote control, a cheesecake, a motor bike."
    assert nodes("objhal", text) == ["person", "dining table", "remote", "cake", "motorcycle"]
    assert nodes("original", text) == ["dining table", "remote"]


@pytest.mark.parametrize(
    ("text", "original", "mended"),
    [
        ("A bus, a minibus, an airbus.", [], ["bus", "bus", "airplane"]),
        ("Airbuses", ["bus"], ["airplane"]),
        ("Two ties, canoes, magpies", [], ["tie", "boat", "bird"]),
        ("Collies and doggies and thieves", [], ["dog", "dog", "person"]),
        ("A motor bike and motor bikes", [], ["motorcycle", "motorcycle"]),
        ("A cheesecake", [], ["cake"]),
        ("iPhones, an iPhone", [], ["cell phone", "cell phone"]),
        ("A stove top oven", ["oven", "oven"], ["oven"]),
        ("A teddy-bear, two hot-dogs", [], ["teddy bear", "hot dog"]),
        ("A cup/bottle", [], ["cup", "bottle"]),
        # what other variants' taggers and lemmatisers get wrong, and neither of these does
        ("Men with vases", ["person", "vase"], ["person", "vase"]),
        ("A man is seated, tied, skiing", ["person"], ["person"]),
        ("A glass, glasses, wine glasses", ["wine glass"], ["wine glass"]),
        ("Tennis rackets, a tennis racket", ["tennis racket"] * 2, ["tennis racket"] * 2),
        # what stays as it is
        ("A remote-controlled plane", ["airplane"], ["airplane"]),
        ("An orange shirt", ["orange"], ["orange"]),
        ("The toilet seat, a seat", ["toilet"], ["toilet"]),
        ("A baby elephant on the train track", ["elephant"], ["elephant"]),
    ],
)
def test_fixed_mends_what_the_card_says(text, original, mended):
    assert (nodes("original", text), nodes("fixed", text)) == (original, mended)


def test_fixed_finds_every_term_as_it_is_listed():
    lexicon = fixed()
    for term, node in lexicon.nodes.items():
        assert [m.node for m in lexicon.mentions(f"One {term}.")] == [node], term


def test_tennis_rackets_are_found_whole():
    text = "a tennis racket"
    spans = {
        name: [text[m.start : m.end] for m in chair.lexicon_for(name).mentions(text)]
        for name in WITHOUT_DATA
    }
    assert spans == {
        "original": ["racket"],  # "tennis" is read as "tenni"
        "sima": ["tennis racket"],
        "objhal": ["tennis racket"],
        "fixed": ["tennis racket"],
    }


@pytest.mark.parametrize("name", WITHOUT_DATA)
@given(text=st.text(alphabet="aseat dogsinkhl toilet-/'.,\n", max_size=60))
def test_reading_again_and_in_another_order_changes_nothing(name, text):
    lexicon = chair.lexicon_for(name)
    first = lexicon.mentions(text)
    lexicon.mentions(text + " dog")
    first.append("something else")  # what a caller does to the answer stays with the caller
    assert lexicon.mentions(text) == first[:-1]


def test_opera_reads_lemmas_by_their_tags():
    lexicon = opera(*SCRIPT)
    text = 'Three "dogs" seated, skiing. Hot dogs, umbrellas'
    found = [(m.term, m.node, text[m.start : m.end]) for m in lexicon.mentions(text)]
    assert found == [
        ("dog", "dog", "dogs"),
        ("seat", "chair", "seated"),  # the verb fires
        ("ski", "skis", "skiing"),
        ("hot dog", "hot dog", "Hot dogs"),
    ]  # "umbrellas", taken for a verb, stays plural and is no term
    assert lexicon.name == "opera"


def test_opera_counts_like_the_original():
    lexicon = opera(*SCRIPT)
    result = chair.score(row("Two dogs are seated, a dog, a cat, a cat."), OBJECTS, lexicon)
    assert (result["n_hallucinated"], result["n_mentions"]) == (3, 5)
    assert result["variant"] == "opera"


def test_opera_keeps_places_where_lower_case_is_longer():
    text = "İİ a dog"
    (mention,) = opera(*SCRIPT).mentions(text)
    assert text[mention.start : mention.end] == "dog"


def test_opera_tags_a_caption_once():
    tagged = []

    def tag(tokens):
        tagged.append(tokens)
        return [(token, "NN") for token in tokens]

    lexicon = opera(str.split, tag, lambda token, pos: token)
    chair.score(row("a dog"), OBJECTS, lexicon)
    chair.pairs(row("a dog"), OBJECTS, lexicon)
    assert tagged == [["a", "dog"]]


def test_opera_without_nltk_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match=r"firsthand\[chair-opera\].*nltk.downloader punkt_tab"):
        opera_words.nltk_tools()


def test_opera_without_data_names_what_is_missing_and_where_it_goes(monkeypatch):
    nltk = pytest.importorskip("nltk", reason="needs nltk: pip install 'firsthand[chair-opera]'")

    def no_data(*_, **__):
        raise LookupError("Resource not found")

    monkeypatch.setattr(nltk, "word_tokenize", no_data)
    monkeypatch.setattr(nltk, "pos_tag", no_data)
    monkeypatch.setattr(nltk.stem.WordNetLemmatizer, "lemmatize", lambda *_: "dog")
    with pytest.raises(ImportError) as caught:
        opera_words.nltk_tools()
    message = str(caught.value)
    assert "not installed: punkt_tab, averaged_perceptron_tagger_eng. Run: python -m" in message
    assert "taggers/averaged_perceptron_tagger_eng/" in message
    assert "NLTK_DATA" in message
    assert "corpora/wordnet" not in message
