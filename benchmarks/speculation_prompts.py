"""Prompts of `benchmarks.speculation`: three whose answers repeat the prompt, ten ordinary ones.

A model of 135M parameters does not follow the first three by itself, so each also has the beginning
of its answer, which the model continues.
"""

from __future__ import annotations

LETTER = """Dear neighbours,

the water pipes in our street will be renewed in the coming month. The work begins on Monday the
fourth of May and will take about three weeks. During this time the water will be turned off on
several days, always between nine in the morning and two in the afternoon. The company will put a
note on your door one day before, so that you can fill a bucket or two.

Please do not park your cars on the north side of the street while the workers are there. They need
the space for their machines, and a car that stands in the way has to be towed at the cost of its
owner. The small car park behind the library is open to all of us for these three weeks, and nobody
will ask for a ticket.

If you have questions, come to the town hall on Thursday evening at seven. The engineer who planned
the work will show the drawings and answer everything you want to know. Those who cannot come may
write to me, and I will pass the questions on.

With kind regards,
Martha Lindgren, for the council of the street"""

CODE = '''import csv
from pathlib import Path


def read_prices(path):
    """Read a table of prices: one product a row, its name and its price."""
    prices = {}
    with open(path, newline="") as file:
        for row in csv.reader(file):
            name, price = row[0].strip(), float(row[1])
            if price < 0:
                raise ValueError(f"the price of {name} is negative")
            prices[name] = price
    return prices


def total(prices, basket):
    """The sum of a basket, which maps names of products to how many of them are bought."""
    result = 0.0
    for name, count in basket.items():
        if name not in prices:
            raise KeyError(f"there is no product {name}")
        result += prices[name] * count
    return result


def main():
    prices = read_prices(Path("prices.csv"))
    basket = {"bread": 2, "milk": 1, "apples": 6}
    print(f"You pay {total(prices, basket):.2f}")


if __name__ == "__main__":
    main()'''

REPORT = """The library of Elmstead was opened in 1911 and has been in the same building ever since.
In the last ten years the number of its visitors has fallen by a third, while the number of books
that are borrowed has stayed the same. The director, Ana Ruiz, says that people order books on the
web and come only to fetch them. She wants to turn the old reading room into a place where children
can do their homework, because the two schools of the town have no such room.

The council is divided. Some of its members say that the town cannot pay for the new room, which
would cost two hundred thousand euros. Others say that the money would be well spent, since a third
of the families have no quiet place at home. The vote will be held on the ninth of June. Until then
everybody may read the plans in the town hall and write down what they think of them."""

# What is asked, and how the answer begins.
REPEATING = {
    "rewriting a text": (
        "Copy this letter word for word, but write 'Friday' in place of 'Thursday' and 'Peter' in "
        f"place of 'Martha'.\n\n{LETTER}",
        "Dear neighbours,\n\nthe water pipes in our street",
    ),
    "editing code": (
        "In the following Python program rename the function `total` to `sum_of_basket`, and print "
        f"the whole program again.\n\n```python\n{CODE}\n```",
        "Here is the whole program with the new name:\n\n```python\nimport csv\nfrom pathlib",
    ),
    "summarising with quotes": (
        "Summarise the report below. Quote its most important sentences word for word, each in "
        f"quotation marks.\n\n{REPORT}",
        'The report is about the library of Elmstead. It begins: "The library of Elmstead was',
    ),
}

ORDINARY = (
    "Why is the sky blue?",
    "Write a short story about a fisherman who finds a map in a bottle.",
    "How do I boil an egg?",
    "Explain to a child what a prime number is.",
    "Give me five ideas for a birthday present for my grandmother.",
    "What were the causes of the First World War?",
    "Write a polite e-mail to my landlord: the heating has been broken since Monday.",
    "What is the difference between a virus and a bacterium?",
    "Write a poem of eight lines about the sea in winter.",
    "Write a Python function that checks whether a word is a palindrome, and explain it.",
)
