"""The demo's prompts: everyday subjects that a reply can describe positively or negatively.

Each asks for one sentence, because the demo's replies are a few dozen tokens long. Each names its subject neutrally, so that
the replies of the model before training are about neutral and the reward can rise.
"""

from __future__ import annotations

WRITE, DESCRIBE = "Write one sentence about {}.", "Describe {} in one sentence."


def _prompts(subjects: str, first: str = WRITE, second: str = DESCRIBE) -> tuple[str, ...]:
    """A prompt for each subject, made from the two templates in turn."""
    parts = " ".join(subjects.split()).split("; ")
    return tuple((second if number % 2 else first).format(part) for number, part in enumerate(parts))


TRAVEL_FOOD_WORK = """
    a train that leaves early in the morning; a hotel room by the motorway; waiting at an airport gate; a long
    drive through flat country; a suitcase that is too heavy; the ferry to the island; asking a stranger for the
    way; a passport queue;
    a sandwich from a vending machine; a bowl of soup that has gone cold; the kitchen after dinner; the taste of
    black coffee; a restaurant that closes at nine; a loaf of bread from yesterday; a recipe with too many steps;
    the fish counter of a supermarket;
    a meeting on a Monday morning; the office printer; an email from the manager; the night shift in a warehouse;
    a desk by the window; a deadline on Friday; a colleague who talks on the phone; the first day at a job
"""
WEATHER = """
    the weather in a small town on a Tuesday; rain on a tin roof; the wind at a bus stop; fog in the valley; the
    first snow of the year; a cloud in front of the sun; a hot afternoon in the city; the forecast for tomorrow
"""
BOOKS_TO_NATURE = """
    a novel with no ending; an old dictionary; a library on a weekday; the main character of a detective story; a
    book on the top shelf; a poem about the sea; a page with a coffee stain; a biography of a king;
    the last match of the season; the stadium after the game; a runner in the last kilometre; a swimming pool at
    seven in the morning; the referee of the final; a tennis lesson; a goalkeeper's gloves; the team that came
    third;
    a bus that arrives late; a street at two in the morning; the traffic lights at the crossing; the house on the
    corner; a lift that stops between floors; a building site next door; the people on the underground; the market
    square at noon;
    a mathematics lesson; the school corridor between lessons; homework on a Sunday evening; a teacher who speaks
    quietly; a pupil in the last row; the school canteen; a report card; the day before the exam;
    a computer that restarts by itself; an old telephone; a password; a software update; a robot that cleans the
    floor; the battery of a phone; a video call with the team; a drawer full of cables;
    a letter from an uncle; a dinner with the whole family; two brothers who share a room; grandmother's living
    room; a child who does not want to sleep; a photograph of a wedding; a cousin who lives abroad; the silence
    after an argument;
    a visit to the dentist; a waiting room; a cold in November; the stairs to the fifth floor; a night without
    sleep; a pair of new glasses; a walk to the chemist's; the nurse at the front desk;
    a crow on a fence; a field in November; a river after heavy rain; a tree by the path; a fox behind the bins;
    the sea in winter; a garden that nobody waters; a stone on the beach
"""
TRAIN_PROMPTS = _prompts(TRAVEL_FOOD_WORK) + _prompts(WEATHER, DESCRIBE, WRITE) + _prompts(BOOKS_TO_NATURE)

# Held out: subjects of the same kinds, and a few of other kinds.
EVAL_PROMPTS = _prompts("""
    a taxi on the way to the station; a picnic under a grey sky; a phone that rings in the office; the morning
    after a storm; the last chapter of a book; a football field in winter; a shop that sells clocks; a classroom
    in summer; a printer without paper; an aunt who visits every summer; a dog at the gate; the pharmacy around
    the corner; a bank account; a painting of a bridge; a song on the radio; a neighbour's new car
""")
