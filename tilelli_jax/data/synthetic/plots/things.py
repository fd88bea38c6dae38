"""Plots about things: lost, shared, grown, given, broken and found."""

from __future__ import annotations

from tilelli_jax.data.synthetic import story_world as world
from tilelli_jax.data.synthetic.plots.layout import Plot, plot

PLOTS: dict[str, Plot] = {
    "lost": plot(world.TOYS, """
{One_day}, {hero} took {his} {colour} {topic} to {place}.
{One_day}, {hero} went to {place} with {his} {colour} {topic}.
{hero} had {a_colour} {topic}, and one {weather} {time} {he} carried it to {place}.

It was the best {topic} in the world, and {he} never went anywhere without it.
{elder} had given it to {him}, and {he} loved it more than anything.
{He} put it down, only for a moment, to watch {an_animal}.
----
But when it was time to go home, the {topic} was gone.
{Suddenly} {he} saw that the {topic} was not there any more.
{Soon} {he} reached for the {topic}, but {his} hand found nothing.

"{Oh_no}!" {cried} {hero}. "Where is my {topic}?"
"My {topic}!" {cried} {hero}. "I had it just now!"
{hero} felt {sad}, and {his} eyes filled with tears.

{He} {looked} behind the {spot} and under the {spot}, but it was not there.
{He} {looked} near the {spot}. {He} {looked} by the {spot}. There was no {topic}.
{He} {walked} back to the {spot} and {looked} there, but found only {an_animal}.
----
{friend} came by and saw {his} {sad} face. "What is wrong?" {fhe} asked.
"Why are you so {sad}?" asked {friend}.
Then {friend} {walked} up the path. "What are you looking for?" {fhe} asked.

"I lost my {colour} {topic}," {said} {hero}. "Can you help me?"
"My {topic} is gone," {said} {hero}. "It is {colour}, and I miss it."

"{Yes}," {said} {friend}. "Four eyes see more than two."
"{Yes}! Let us look together," {said} {friend}.
----
{Suddenly} {friend} {cried}, "Look! Something {colour} is under the {spot}!"
{Soon} {friend} pointed at the {spot}. Something {colour} was in there.
They saw {an_animal} by the {spot}, and it was sitting on something {colour}.

It was the {topic}! {hero} jumped up and down.
It was the lost {topic}, a bit dirty but not broken.

"Thank you, {friend}!" said {hero}. "You are a real friend."
{hero} was so {happy} that {he} let {friend} play with it first.
From then on {he} looked after {his} {topic} well.
"""),
    "share": plot(world.FOODS, """
{One_day}, {elder} gave {hero} {a_topic} to take along to {place}.
{One_day}, {hero} sat down at {place} to eat {a_topic}.
{hero} had {a_topic}, and {he} wanted to eat it all alone at {place}.

It smelled so {good} that {an_animal} came to look.
{He} had waited for it all day, and {he} was very hungry.
{He} sat down by the {spot} and opened {his} {colour} bag.
----
{Suddenly} {friend} came by. {Fhe} had nothing to eat.
Then {friend} sat down beside {him}. {Fhe} looked pale and tired.
By the {spot} sat {friend}, and {fhe} was {sad}.

"I am so hungry," said {friend}. "I forgot my lunch at home."
"What do you have there?" asked {friend}, and {fhis} tummy made a noise.
----
{hero} looked at the {topic}. It was not very big.
"It is only one {topic}," thought {hero}. "If I share it, there will be less for me."
{hero} turned away and held the {topic} tight.

But then {he} saw the face of {friend}, and {his} heart grew soft.
But {he} remembered how {friend} had helped {him} last week.
Then {he} thought, "What would {elder} do?"

"Here, take half of it," said {hero}.
"Come, we will share it," said {hero}, and {he} made two halves.
"Would you like some?" asked {hero}. "There is enough for two."
----
"Oh, thank you!" said {friend}. "You are so kind."
{friend} smiled with {fhis} whole face.

They ate the {topic} together, and it had never tasted so good.
They sat side by side and ate, and even {an_animal} got a crumb.

The next day {friend} brought {a_food} and gave {him} half of it.
"A shared {topic} is twice as good," {hero} told {elder} later.
{Soon} they were both full, and they played at {place} until evening.
"""),
    "garden": plot(world.PLANTS, """
{One_day}, {hero} found a {little} seed on the way to {place}.
{One_day}, {elder} came back from {place} and gave {hero} a {little} seed.
{One_day}, {an_animal} dropped a {little} seed in front of {hero} near {place}.

"What is it?" asked {hero}. "Plant it, and you will see," {said} {elder}.
"What will it be?" {he} asked. "You must wait and see," {said} {elder}.
----
{hero} dug a hole beside the {spot} and put the seed into the earth.
{He} put it in {a_colour} pot with good dark earth.

Every morning {he} gave it water from {a_paint} can.
{He} gave it water every day and sang to it.

But nothing came up. One week went by, and then another.
"Why does it not grow?" asked {hero}. {He} wanted to dig it up.
{friend} came to look. "There is nothing there," {fhe} said.

"Good things take time," {said} {elder}.
"It is growing where you cannot see it," {said} {elder}.
"Wait a little longer," {said} {elder}. "It needs sun and rain."
----
One fine morning, {hero} saw a tiny green leaf.
Then, after a warm rain, something green peeked out.
And after {number} days a {little} green tip came up.

"It is alive!" {cried} {hero}, and {he} ran to tell {friend}.
{hero} called {friend} and {elder}, and they all came to see.

It grew and grew, first to {his} knee and then to {his} chin.
It grew a bit every day, and {an_animal} sat beside it and watched.
----
{Soon} they could see what it was: {a_topic}!
And in the end it was {a_topic}, the finest that {friend} had ever seen.
"It is {a_topic}!" {cried} {hero}. "My own {topic}!"

{hero} was so {happy} that {he} gave {friend} a seed as well.
"You did that," said {elder}, "with water and with patience."
Now there is {a_topic} behind every house near {place}.
"""),
    "gift": plot(world.GIFTS, """
It was almost the birthday of {elder}, and {hero} had no present.
Tomorrow was a big day: it was the birthday of {elder}.

"What can I give {ehim}?" asked {hero}. {He} had no money at all.
{hero} looked at the things in the shop by {place}, but they cost too much.

So {he} went to {place} to think about it.
{He} met {friend} at {place} and asked {fhim} what to do.
{He} sat by the {spot} near {place} and thought and thought.
----
"You could make {a_topic}," {said} {friend}. "I will help you."
{Suddenly} {he} knew it. "I will make {a_topic}!" {he} said.
Then {he} saw {an_animal}, and that gave {him} an idea: {he} would make {a_topic}.

It had to be {colour}, because {elder} loved that color.
It took all day, and {hero} used everything {colour} that {he} could find.
{hero} worked {slowly}, and {friend} brought {him} what {he} needed.

But at the end it fell into the grass and was bent on one side.
When it was done, it did not look the way {he} had wanted.
One corner was a bit crooked, and there was a {little} spot on it.

"It is not pretty," said {hero}, and {he} was {sad}.
"{Oh_no}, now it is spoiled!" {cried} {hero}.
----
"Give it to {ehim} anyway," {said} {friend}. "You made it yourself."
"I like it," said {friend}. "Nobody else has one like that."

The next morning {hero} held out the {colour} {topic}. "Happy birthday, {elder}!"
In the morning {he} put the {colour} {topic} beside the plate of {elder} and waited.

{elder} looked at the {topic} for a long time, and then {ehe} {smiled}.
"Oh, {a_topic}!" {said} {elder}. "Did you make it for me?"

"It is the best present that I ever got," {ehe} said.
{Ehe} hugged {hero} and put the {topic} where everybody could see it.
"This {topic} was made with love," said {elder}, "and that is what counts."
"""),
    "truth": plot(world.BREAKABLES, """
{One_day}, {hero} came home from {place} and began to run around in the house.
{One_day}, {hero} wanted to go to {place}, but it rained. So {he} played ball inside.
{hero} and {friend} were too loud. "Go and play at {place}," said {elder}. But they stayed.

In the room stood the {colour} {topic}. {elder} loved that {topic} very much.
{elder} had {a_colour} {topic}. "Be careful with it," {ehe} always said.
----
{hero} turned around too fast, and crash! The {topic} fell down and broke.
{Suddenly} there was a loud crash. The {topic} was broken in {number} pieces.
{He} took one step back and bumped into the {topic}. It fell, and it broke.

"{Oh_no}, what have I done?" said {hero}.
{hero} stood still, and {his} face turned red.

{He} picked up the pieces and hid them behind the {spot}.
{He} pushed the broken {topic} under the bed and ran out to the {spot}.
----
"Where is my {topic}?" asked {elder} at supper.
{Soon} {elder} came in and looked around. "Who has seen my {topic}?" {ehe} asked.

"Maybe {an_animal} took it," {said} {hero}, and {he} did not look up.
"I do not know," {said} {hero}. But {his} voice was very small.

In bed {hero} could not sleep. {His} tummy felt like a stone.
{He} could not eat {his} {food}. The lie was too heavy.
{friend} looked at {him}. "You should tell the truth," {fhe} whispered.
----
Then {he} got up and went to {elder}. "I broke the {topic}," {he} said. "I am sorry."
At last {he} took all {his} courage. "It was me," {he} said. "I broke your {topic}."

{elder} was quiet for a moment. Then {ehe} took {him} in {ehis} arms.
"Thank you for telling me," said {elder}. "That was brave."
"I am sad about the {topic}," said {elder}, "but glad that you told me."

Together they put the pieces together again with glue.
The next day they mended the {topic}, and {friend} helped them.

It was not like new, but {hero} felt light again.
"A {topic} can be mended," {said} {elder}, "and so can a lie, if you tell the truth."
"""),
    "treasure": plot(world.TREASURES, """
{One_day}, {hero} found an old map behind the {spot}.
{One_day}, {an_animal} dug up a bottle, and in it {hero} found an old map.
{elder} had an old map in a box. {One_day}, {ehe} gave it to {hero}.

On it was {place}, and beside it there was {a_colour} cross.
It showed the way to {place}, and at the end was {a_colour} cross.

"A treasure!" {cried} {friend}. "Can I come with you?"
{He} showed it to {friend}. "Let us go {quickly}!" {said} {friend}.
----
They took a shovel and {a_food}, and off they went.
"{Yes}, let us go together," {said} {hero}, and they set off.

First they went {number} steps to the {spot}.
The map said: go from the {spot} to the {spot}.

Then they had to go around the {spot}, where {an_animal} was sleeping.
Then they came to some deep mud. {hero} gave {friend} {his} hand.
Then the path split in two. "Left," {said} {hero}. "Right," {said} {friend}.

They lost the way once and had to go back.
A cold wind blew, and {friend} got tired. "Just a bit more," said {hero}.
-
----
At last they saw the mark, {a_colour} cross on a stone.
And there, near {place}, they found the {colour} cross.

They dug and dug until the shovel hit something hard.
{hero} dug, and {friend} carried away the earth.

It was a {little} chest, and in it was {a_topic}!
Under a flat stone lay {a_topic}.
----
"Who shall have it?" asked {friend}.
"It is yours, you found the map," {said} {friend}.

"It belongs to both of us," {said} {hero}. "One week you, one week me."
"We will show the {topic} to everybody at {place}," {said} {hero}.
"Let us keep the {topic} in our secret place," {said} {hero}.

"The best part was looking for it with you," said {friend}.
{elder} looked at the {topic} and {smiled}. "I hid it when I was small," {ehe} said.
Then they drew a new map, for the next ones to find.
"""),
}
