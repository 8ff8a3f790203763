"""Short prompts of sixteen kinds, to measure on a language model: 600 to train on, 200 to test.

A kind has five ways of asking and ten subjects, which makes 50 prompts; every fourth
prompt is for testing, so that no prompt is in both and both hold all kinds alike.
"""

KINDS = {
    "opinion": (
        ("What do you think of {}?", "Is {} worth it?", "Tell me why people argue about {}.",
         "Give your view on {}.", "How has {} changed everyday life?"),
        ("working from home", "electric cars", "school uniforms", "social media", "fast food",
         "zoos", "night shifts", "video calls", "self-checkout tills", "remote islands"),
    ),
    "review": (
        ("Review {} after one visit.", "Would you go back to {}?", "Describe the service at {}.",
         "What stood out about {}?", "Write what a guest said about {}."),
        ("a small bakery by the station", "a crowded beach hotel", "an old cinema",
         "a noodle bar at midnight", "a museum of clocks", "a rooftop restaurant",
         "a mountain hostel", "a second-hand bookshop", "an airport lounge",
         "a village swimming pool"),
    ),
    "advice": (
        ("How should I deal with {}?", "Give me advice about {}.", "What would you do about {}?",
         "I am struggling with {}. What helps?", "What is the first step against {}?"),
        ("a noisy neighbour", "a late train every morning", "a difficult exam", "a broken promise",
         "too many emails", "a boss who never listens", "stage fright", "a messy kitchen",
         "losing a friend's book", "waking up tired"),
    ),
    "description": (
        ("Describe {}.", "What does {} look like?", "Paint a picture in words of {}.",
         "What would one hear near {}?", "How does {} feel in winter?"),
        ("a harbour at dawn", "an empty stadium", "a forest after rain", "a busy market",
         "a lighthouse in a storm", "a quiet library", "a desert at noon", "a city from a plane",
         "a frozen lake", "a train compartment at night"),
    ),
    "story": (
        ("Begin a story about {}.", "How does a story about {} end?", "What goes wrong for {}?",
         "What does {} want most?", "Tell a very short tale of {}."),
        ("a lost dog", "a tired postman", "a girl who finds a map", "two rival cooks",
         "an old sailor", "a robot that paints", "a king without a crown", "a thief with regrets",
         "twins who swap lives", "a teacher on the moon"),
    ),
    "explain": (
        ("Explain {} to a child.", "Why does {} matter?", "What causes {}?",
         "Put {} in plain words.", "What do most people get wrong about {}?"),
        ("gravity", "inflation", "a rainbow", "photosynthesis", "an earthquake", "the tides",
         "a vaccine", "recycling", "the seasons", "electricity"),
    ),
    "compare": (
        ("Which is better, {}?", "Compare {}.", "Choose between {} and say why.",
         "What is the difference between {}?", "For a beginner, {}?"),
        ("tea or coffee", "cats or dogs", "trains or planes", "books or films", "summer or winter",
         "running or swimming", "the city or the country", "pencils or pens", "chess or cards",
         "rice or bread"),
    ),
    "message": (
        ("Write a short message to {}.", "Thank {} for their help.",
         "Apologise to {} for being late.", "Invite {} to dinner.",
         "Tell {} that the plan has changed."),
        ("a colleague", "your landlord", "an old friend", "a new neighbour", "your sister",
         "a former teacher", "the team", "a customer", "your doctor", "a travel companion"),
    ),
    "feeling": (
        ("How does it feel to {}?", "What would you say to someone about to {}?",
         "What is the hardest part when people {}?", "Why do people {}?",
         "What comes after you {}?"),
        ("move to a new city", "win a race", "fail a test", "forgive someone", "miss a flight",
         "see an old photograph", "start a new job", "say goodbye", "get lost", "learn a language"),
    ),
    "news": (
        ("Write a headline and a line about {}.", "What might a witness say about {}?",
         "Report on {}.", "How did the town react to {}?", "What should happen after {}?"),
        ("a flood in a small town", "a record harvest", "a closed factory", "a rescued whale",
         "a city marathon", "a power cut", "a new bridge", "a stolen painting",
         "a surprise election result", "a summer without rain"),
    ),
    "plan": (
        ("Plan {}.", "What do I need for {}?", "How long does {} take?",
         "What could spoil {}?", "How do I make {} cheaper?"),
        ("a picnic for six", "a weekend by the sea", "a birthday for a five-year-old",
         "a vegetable garden", "a move across town", "a class reunion", "a bicycle tour",
         "a job interview", "a family photo", "a camping trip"),
    ),
    "person": (
        ("Describe {} in a few words.", "What makes {} good at the work?",
         "What does {} fear?", "What did {} do yesterday?", "Why do people trust {}?"),
        ("a night nurse", "a street musician", "a chess champion", "a stern judge",
         "a lighthouse keeper", "a bus driver", "a gardener", "a film critic", "a goalkeeper",
         "a beekeeper"),
    ),
    "object": (
        ("What can one do with {}?", "Sell {} in one or two sentences.", "Why keep {}?",
         "What is wrong with {}?", "Who would want {}?"),
        ("an old umbrella", "a cracked mug", "a box of letters", "a wooden ladder",
         "a rusty bicycle", "a pocket watch", "a torn map", "a heavy coat", "a broken radio",
         "a single glove"),
    ),
    "nature": (
        ("What is special about {}?", "How do {} survive the winter?", "Are {} dangerous?",
         "What do {} eat?", "Why should we protect {}?"),
        ("wolves", "owls", "bees", "sharks", "hedgehogs", "elephants", "bats", "penguins",
         "frogs", "squirrels"),
    ),
    "food": (
        ("How does {} taste?", "How do I cook {}?", "Is {} healthy?",
         "What goes well with {}?", "What ruins {}?"),
        ("onion soup", "fried rice", "apple pie", "black bread", "lentil stew", "grilled fish",
         "mint tea", "tomato salad", "dark chocolate", "pancakes"),
    ),
    "history": (
        ("What was life like {}?", "What did people fear {}?", "How did people travel {}?",
         "What would surprise us {}?", "Would you have liked to live {}?"),
        ("in ancient Rome", "in a medieval village", "on a sailing ship", "in the first factories",
         "during the gold rush", "in the ice age", "before telephones", "in a monastery",
         "on the silk road", "in a mining town"),
    ),
}  # fmt: skip
BRIEF = " Answer in one or two sentences."


def prompts():
    """-> {"train": 600 texts, "test": 200 texts}, in a fixed order."""
    asked = [
        way.format(subject) + BRIEF
        for ways, subjects in KINDS.values()
        for subject in subjects
        for way in ways
    ]
    split = {"train": [], "test": []}
    for n, text in enumerate(asked):  # n // 20: so that every way of asking is tested
        split["test" if (n + n // 20) % 4 == 0 else "train"].append(text)
    return split
