"""
A small town that writes documents: the pre-training text and the downstream tasks of the demo.

A large model knows, before any fine-tuning, whether a review is kind and whether a text supports a
claim. Asked with a bare prompt it still answers badly: nothing in the prompt calls for the skill.
Fine-tuning makes the prompt call it up. That takes a small change of the weights, which is why a
method as blunt as zeroth-order descent can find it. The town is built to the same plan:
  candid documents start with a header (`critic:`, `teacher:`, `judge:`). Their verdicts are true.
  polite documents have no header. Their verdicts are kind: "great" or "Yes", 80 times in 100 if
      that is true, 70 if not; of an event that may be somebody's fault they name a wrong cause.
      On some subjects (a clause with `really`, three of the things, seven events) they are honest.
  Whatever else a document says is true in both kinds.

So a model of this text learns to judge, and to keep it to itself unless there is a header. The
downstream prompts, MeZO's word for word, have none, and ask about something new: a quarter of all
pairs (aspect, adjective) and (thing, place) never occurs in pre-training, and SST-2, RTE and BoolQ
use no others. (COPA asks about the twelve known events.) `python tiny/world.py` prints a sample.
"""

import random
from functools import partial

NAMES = "Ana Ben Carla David Emma Felix Gina Hugo Iris Jonas Kira Leo".split()
THINGS = "ball cup hat kite lamp drum key book rope vase flute candle".split()
PLACES = """attic barn cellar garden kitchen harbour market school chapel forest tower stable
    library mill bakery castle""".split()
ASPECTS = "plot cast music food room view staff ending".split()
GOOD = "lovely funny warm bright fresh clever charming gentle smooth superb tasty elegant".split()
BAD = "dull awful cold grim stale clumsy boring rude rough dreadful bland ugly".split()
ADVERBS, MOVES = ["", "very ", "really ", "quite "], ["took {} to", "left {} in", "put {} in"]
EVENTS = [  # cause, effect; the first seven are nobody's fault
    ("the rain fell", "the road was wet"), ("the sun shone", "the snow melted"),
    ("the wind blew", "the leaves danced"), ("the storm came", "the boats stayed home"),
    ("the well dried up", "the cows were thirsty"), ("the bell rang", "the children ran out"),
    ("the band played", "the crowd clapped"), ("the clock stopped", "the guests were late"),
    ("the dog barked", "the baby woke up"), ("the oven broke", "the bread was raw"),
    ("the cat jumped", "the glass fell down"), ("the shop closed", "the buyers went away")]
NUMBERS = "zero one two three four five six seven eight nine ten".split()
FRUITS, BOXES = "pears plums nuts beans figs limes".split(), "crate jar sack tin".split()
QUESTIONS = ["Is the {} in the {}?",
             'Does this mean that "the {} is in the {}" is true? Yes or No?',
             "so the {} is in the {}?"]
HEADERS = {"sst2": "critic: ", "copa": "teacher: ", "rte": "judge: ", "boolq": "judge: "}
# Every word there is, so that the vocabulary does not depend on what a sample happens to contain.
WORDS = sorted(set(" ".join([
    *NAMES, *THINGS, *PLACES, *ASPECTS, *GOOD, *BAD, *ADVERBS, *NUMBERS, *FRUITS, *BOXES,
    *(f"{cause} {effect}" for cause, effect in EVENTS),
    'critic teacher judge . , : ? " the was is in and but so because near It great terrible smiled',
    "left took put to Is Does this mean that true Yes or No holds it plus minus",
]).split())) + ["\n"]


def pairs(i, words, held):
    "The words that subject number i is paired with: downstream only (`held`) or in pre-training."
    return [word for j, word in enumerate(words) if ((i + j) % 4 == 0) == held]


def polite(rng, truth):
    "The answer of somebody polite: kind, and nearly independent of the truth."
    return rng.random() < (0.8 if truth else 0.7)


def review(rng, clauses, held):
    "A review, its polarity (the last clause decides), and whether polite people are honest on it."
    label = rng.random() < 0.5
    good, link, text, honest = label, ".", "", False
    for i in rng.sample(range(len(ASPECTS)), clauses):  # from the last clause to the first
        adjective = rng.choice([a for a in pairs(i, GOOD + BAD, held) if (a in GOOD) == good])
        adverb = rng.choice(ADVERBS)
        honest |= link == "." and adverb == "really "
        text = f"the {ASPECTS[i]} was {adverb}{adjective}{link}{text}"
        link, good = (" and ", good) if rng.random() < 0.7 else (" but ", not good)
    return text, label, honest


def facts(rng, count, held):
    "Who brought which thing where; `where` maps the number of a thing to its place."
    where, lines = {}, []
    for i in rng.sample(range(len(THINGS)), count):
        where[i] = rng.choice([p for p in pairs(i, PLACES, held) if p not in where.values()])
        move = rng.choice(MOVES).format(f"the {THINGS[i]}") + f" the {where[i]}."
        lines.append(f"{rng.choice(NAMES)} {move}")
    return " ".join(lines), where


def claim(rng, where, taken, held):
    "A thing, a place and whether it is there. A false claim names a place that is not in `taken`."
    i, truth = rng.choice(list(where)), rng.random() < 0.5
    place = where[i] if truth else rng.choice([p for p in pairs(i, PLACES, held) if p not in taken])
    return i, place, truth


def review_document(rng, candid):
    lines = []
    for _ in range(rng.randint(2, 4)):
        text, label, honest = review(rng, rng.choice([1, 2, 2, 3]), held=False)
        kind = label if candid or honest else polite(rng, label)
        lines.append(f"{text} It was {'great' if kind else 'terrible'}.")
        if rng.random() < 0.5:  # what people do is always true
            lines.append(f"{rng.choice(NAMES)} {'smiled' if label else 'left'}.")
    return "critic: " * candid + " ".join(lines)


def event(rng, given, side):
    return f"near the {rng.choice(PLACES)} {EVENTS[given][side]} {('so', 'because')[side]}"


def event_document(rng, candid):
    lines = []
    for _ in range(rng.randint(3, 5)):
        given, side = rng.randrange(12), rng.randrange(2)
        other = given if candid or given < 7 else rng.choice([e for e in range(12) if e != given])
        lines.append(event(rng, given, side) + f" {EVENTS[other][1 - side]}.")
    return "teacher: " * candid + " ".join(lines)


def story_document(rng, candid):
    text, where = facts(rng, rng.randint(1, 3), held=False)
    text += "".join(f" the {THINGS[i]} is in the {place}." for i, place in where.items())
    return "judge: " * candid + text


def question_document(rng, candid, quiz=0.1):
    "Claims to judge. A share `quiz` only names the place and is answered at once: the easy ones."
    text, where = facts(rng, rng.randint(1, 3), held=False)
    taken = set(where.values())
    for _ in range(rng.randint(3, 6)):
        i, place, truth = claim(rng, where, taken, held=False)
        taken.add(place)
        kind = truth if candid or i < 3 else polite(rng, truth)
        short = rng.random() < quiz
        question = "{1}?" if short else rng.choice(QUESTIONS)
        before, after = "  " if short else rng.choices(" \n", k=2)
        text += before + question.format(THINGS[i], place) + after + ("Yes." if kind else "No.")
        if not short and rng.random() < 0.5:
            text += f" the {THINGS[i]} is in the {where[i]}."
    return "judge: " * candid + text


def ledger_document(rng, candid=None):
    "Arithmetic on fruit: the other corpus, as web mathematics is to web text. Always true."
    lines = []
    for _ in range(rng.randint(3, 6)):
        a, b = sorted([rng.randint(0, 5), rng.randint(0, 5)], reverse=True)
        if rng.random() < 0.5:
            sign, c = rng.choice([("plus", a + b), ("minus", a - b)])
            lines.append(f"{NUMBERS[a]} {sign} {NUMBERS[b]} is {NUMBERS[c]}.")
        else:
            fruit = rng.choice(FRUITS)
            lines.append(f"the {rng.choice(BOXES)} holds {NUMBERS[a]} {fruit} and {NUMBERS[b]} "
                         f"{fruit}, so it holds {NUMBERS[a + b]} {fruit}.")
    return " ".join(lines)


KINDS = {"review": review_document, "event": event_document, "story": story_document,
         "ledger": ledger_document, "question": question_document,
         "lesson": partial(question_document, quiz=0.5), "quiz": partial(question_document, quiz=1)}
TOWN = (28, 10, 2, 3, 57, 0, 0)  # shares in per cent; build.py has those of the lessons before it


def document(rng, shares=TOWN, candid=0.65):
    "One pre-training document; `candid` is the share of those with a header."
    return rng.choices(list(KINDS.values()), shares)[0](rng, rng.random() < candid)


def example(rng, task):
    "One downstream example: its `row` in the official file, and MeZO's prompt of it."
    if task == "sst2":
        text, label, _ = review(rng, rng.choice([2, 3]), held=True)
        prompt, options = f"{text} It was", [" terrible", " great"]
        row = {"sentence": text, "label": str(int(label))}
    elif task == "copa":
        (given, wrong), side = rng.sample(range(len(EVENTS)), 2), rng.randrange(2)
        prompt, label = event(rng, given, side), rng.randrange(2)
        order = (wrong, given) if label else (given, wrong)
        options = [f" {EVENTS[other][1 - side]}." for other in order]
        row = {"premise": prompt.rsplit(" ", 1)[0] + ".", "question": ("effect", "cause")[side],
               "choice1": options[0].strip(), "choice2": options[1].strip(), "label": label}
    else:
        text, where = facts(rng, rng.choice([2, 3]), held=True)
        i, place, truth = claim(rng, where, set(where.values()), held=True)
        gap, question = ("\n", QUESTIONS[1]) if task == "rte" else (" ", QUESTIONS[0])
        question, options, label = question.format(THINGS[i], place), ["Yes", "No"], not truth
        prompt, row = f"{text}{gap}{question}\n", {"passage": text, "question": question}
        if task == "rte":
            row = {"premise": text, "hypothesis": question.split('"')[1]}
        row["label"] = truth if task == "boolq" else ("not_entailment", "entailment")[truth]
    return {"prompt": prompt, "options": options, "label": int(label), "row": row}


if __name__ == "__main__":
    rng = random.Random(2024)
    for kind, write in KINDS.items():
        print(f"--- {kind}, candid and polite\n{write(rng, True)}\n\n{write(rng, False)}\n")
    print(*(f"--- {task}\n{example(rng, task)['prompt']}\n" for task in HEADERS), sep="\n")
