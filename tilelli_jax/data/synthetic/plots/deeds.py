"""Plots about deeds: saving, being brave, learning, making friends, helping."""

from __future__ import annotations

from tilelli_jax.data.synthetic import story_world as world
from tilelli_jax.data.synthetic.plots.layout import Plot, plot

PLOTS: dict[str, Plot] = {
    "rescue": plot(world.BABIES, """
{One_day}, {hero} was walking to {place} when {he} heard a {little} cry.
{One_day}, near {place}, {hero} heard somebody cry for help.
{One_day}, {hero} and {elder} were on the way to {place}. They heard a weak voice.

It came from behind the {spot}.
"Who is there?" asked {hero}. Nobody answered, so {he} looked behind the {spot}.
{He} stood still and listened. The sound came from the {spot}.
----
There sat {a_topic}, and its leg was caught in a {colour} string.
{He} found {a_topic} that was stuck and could not get out.
{A_topic} was lying there, cold and {afraid}.

"{Oh_no}, you poor {topic}!" said {hero}. "Do not be {afraid}."
The {topic} looked at {him} with {big} dark eyes.
"I will help you," said {hero}, very softly.
----
{He} did not know what to do, so {he} ran to {elder}.
{hero} tried to help, but {he} could not do it alone. "{elder}!" {he} called.

"Be calm and move {slowly}," {said} {elder}. "Then it will trust you."
"We need some water and a warm cloth," {said} {elder}.
{elder} came {quickly} and {ehe} knew just what to do.

Together they set the {topic} free and gave it something to drink.
{elder} held the {topic}, and {hero} freed it {slowly}.
{hero} put the {topic} into {his} {colour} hat and carried it home to get warm.
----
{Soon} the {topic} stood up and shook itself.
After three days the {topic} was strong and well again.

"Can we keep it?" asked {hero}. "No, its mother is waiting," {said} {elder}.
"Now it must go back to its mother," {said} {elder}, and {hero} understood.
{hero} wanted to keep it, but {he} knew that the {topic} belonged outside.

The {topic} looked back once, and then it went to its mother.
They took it back to {place}, and there its mother was waiting.

Ever since, the {topic} comes to the window to say hello.
{hero} was {happy}, because even a {little} {kind} can help.
"""),
    "storm": plot(world.TOYS, """
{One_day}, {hero} and {friend} were playing at {place} with {a_colour} {topic}.
{One_day}, {hero} took {a_colour} {topic} and went to {place} with {friend}.
{hero} and {friend} met at {place}. {hero} had brought {a_colour} {topic}.

The sky was blue, and {an_animal} was sleeping in the sun.
They laughed and played for a long time.
-
----
{Suddenly} the sky grew dark, and the wind began to blow.
Then a {big} black cloud came over the hills.
{Soon} the first drops of rain fell on their noses.

The wind took the {topic} and threw it against the {spot}.
"The {topic} will get wet!" {cried} {hero}, and {he} hid it under {his} coat.
"{Oh_no}, my {topic}!" {said} {hero}, and {he} held on to it with both hands.

"I am {afraid}," said {friend}. There was a loud boom of thunder.
There was a flash and a boom, and {friend} began to cry.
----
"Take my hand," {said} {hero}. "We will find a dry place."
"Do not be {afraid}," {said} {hero}. "I am with you."
{hero} was {afraid} too, but {he} took the hand of {friend}.

They ran {quickly} to the {spot} and sat down behind it, close together.
{elder} came with {a_paint} umbrella. "Come under here, you two!" {ehe} called.
They found a dry corner by the {spot}, where {an_animal} was hiding too.

To make the time go by, they sang a song and counted the drops.
"Let us count until the next boom," said {friend}, and they counted to {number}.
----
{Soon} the rain stopped, and the sun came out again.
After the storm everything smelled fresh and green.

A {big} rainbow stood over {place}.
"Look, a rainbow!" {cried} {friend}. It went from {place} up to the clouds.

The {topic} was wet, but they dried it in the sun.
The {topic} was safe and dry, and so they played on.

Since that day, {friend} is not afraid of storms any more.
"Storms are not so bad when you have a friend," said {hero}.
"""),
    "learn": plot(world.SKILLS, """
{hero} wanted to learn to {topic}. All the others at {place} could do it.
{One_day}, {hero} saw {friend} at {place}. {friend} could {topic}, and {hero} could not.
More than anything, {hero} wished to {topic}, just like {friend} did at {place}.

"I will never learn to {topic}," {he} thought.
"It looks so easy!" said {hero}. But it was not easy at all.
{He} tried once, but {an_animal} laughed at {him}, and {he} gave up.
----
"Can you teach me to {topic}?" {he} asked {elder}.
{elder} saw it. "Shall I show you how to {topic}?" {ehe} asked.
So {he} went to {elder}. "Please show me how to {topic}," {he} said.

"{Yes}," {said} {elder}, "but you must try more than once."
"{Yes}," {said} {elder}. "First you watch, and then you try."
"Nobody can do it the first time," {said} {elder}. "Come with me."
----
The first time it went all wrong, and {friend} had to laugh.
{hero} tried and tried, but {he} only got tired and {sad}.
On the first day it did not work. On the second day it did not work.

"I cannot do it!" {cried} {hero}. "Not yet," {said} {elder}.
"Try again," said {elder}. "You are already better than before."
{friend} came along. "I needed {number} days to learn it," {fhe} said.

So {he} took a deep breath and began again, {slowly}.
The next morning {he} got up early and tried again, {number} times.
{He} thought of what {elder} had said, and {he} did not give up.
----
{Suddenly} it worked! {hero} could {topic}!
And {soon} it was not so hard any more. {hero} could {topic} at last.

"Look at me!" {he} {cried}. "I can {topic}!"
{elder} clapped {ehis} hands, and {friend} {cried}, "Hooray!"
{hero} was so {happy} that {he} danced around the {spot}.

Now {he} teaches all the {little} ones at {place}.
"You see," said {elder}, "you only had to keep trying."
"""),
    "noise": plot(world.NOISEMAKERS, """
One night {hero} lay in {his} bed in the {little} house near {place}.
One dark night {hero} was sleeping in a tent near {place}, with {friend} beside {him}.
It was late, and the moon shone over {place}. {hero} could not sleep.

{Suddenly} {he} heard a strange noise. Tock, tock, tock!
Then there was a sound from the {spot} outside. Scratch, scratch!
{Suddenly} something went bump behind the {spot}.

{hero} pulled the {colour} blanket over {his} head.
{He} was {afraid}, and {his} heart beat fast.
----
"Maybe it is a monster," {he} thought.
"{elder}, there is something outside!" {he} whispered.
"Did you hear that?" {he} asked, but nobody was awake.

There it was again, and this time it was louder.
The wind blew, and the noise came closer.
-

But {hero} wanted to know what it was. {He} lit {his} {paint} lamp.
"I will go and look," said {hero}, and {he} took {his} {paint} lamp.
{elder} woke up. "Let us go and see," {ehe} said and took the {paint} lamp.
----
Step by step, {slowly}, {he} went to the door.
{He} opened the door {slowly} and held up the light.

{He} looked by the {spot} and by the {spot}. And there {he} saw it.
The light fell on the {spot}, and {hero} began to laugh.

It was only {a_topic}! That was what had made the noise.
There was no monster at all. It was {a_topic}, nothing more.

"{Hello}, {topic}," said {hero}. "So it was you!"
"You gave me a fright, silly {topic}!" said {hero}.
----
In the morning {he} told {friend} about it, and they both laughed.
After that {he} slept well until the sun came up.

"Most monsters are {little} things in the dark," said {elder}.
Since then {hero} listens to the noises of the night and is not afraid.
"Next time I will not be {afraid}," said {hero}.
"""),
    "newcomer": plot(world.GAMES, """
{One_day}, somebody new came to {place}. It was {friend}, and {fhe} did not know anyone.
{One_day}, {hero} saw a new face at {place}. It belonged to a {friend_kind} named {friend}.
A new family moved into the {paint} house by {place}. Their {friend_kind} was named {friend}.

All the others were playing {topic}, but {friend} stood alone by the {spot}.
The children were playing {topic}. {friend} only watched from behind the {spot}.

{Fhe} wore {a_colour} hat and looked {sad}.
{Fhe} held {a_colour} bag and did not say a word.
-
----
{hero} remembered how it feels to be alone.
"Why does {fhe} not play with us?" asked {hero}. "Maybe {fhe} is shy," {said} {elder}.

So {he} {walked} over. "{Hello}, I am {hero}," {he} said. "What is your name?"
{He} went up to {fhim} and {smiled}. "{Hello}! Who are you?"

"I am {friend}," {fhe} said, very softly.
"My name is {friend}," came the answer. "We came here {number} days ago."

"Do you want to play {topic} with us?" asked {hero}.
"Come and play {topic}!" said {hero}. "It is more fun with you."

"I do not know how to play {topic}," {said} {friend}.
"Where I come from, nobody plays {topic}," {said} {friend}.
----
"That does not matter," {said} {hero}. "I will show you."
"It is easy," {said} {hero}. "Just do what I do."

At first {friend} made mistakes, but nobody minded.
They began {slowly}, and {soon} {friend} was as good as the others.
{Soon} {friend} laughed so loud that {an_animal} ran away.

They played {topic} until the sun went down.
In the end {friend} even won a game of {topic}.
----
"Will you come again tomorrow?" asked {hero}. "{Yes}!" {said} {friend}.
"Today I found a friend," said {friend} on the way home.
From that day on, {hero} and {friend} were always together.
The next day {friend} brought {a_food} for everybody.
"""),
    "race": plot(world.RIDES, """
{One_day}, there was a {big} race at {place}. Everybody came with {a_topic}.
Every year there is a race at {place}, and everybody rides {a_topic}.

{hero} had painted {his} {topic} {colour}, and {he} wanted to win.
{hero} had the fastest {topic} of all, and it was {colour}.

"I will beat you!" said {friend}. "We will see," {said} {hero}.
"Good luck," said {elder}. "And take care of each other."
----
"One, two, three, go!" {cried} {elder}, and off they went.
{elder} waved {a_paint} flag, and the race began.

{hero} was in front. The wind blew in {his} face, and {he} felt {happy}.
First {friend} was ahead, and then {hero} was ahead.
{He} went past the {spot}, past {an_animal} and past the {spot}.

{Suddenly} there was a cry. {friend} had hit the {spot} and fallen down.
{Soon} {he} heard a crash behind {him}. {friend} was lying by the {spot}.
----
The end of the race was so near! But {hero} looked back.
{hero} could see the end of the race. {He} only had to go on.

{He} stopped {his} {topic} and {walked} back to {friend}.
"Winning can wait," {he} thought, and {he} turned {his} {topic} around.
Then {he} jumped off the {topic} and ran to help.

"Are you hurt?" asked {hero}. "My knee," {said} {friend}, and {fhe} cried.
"Can you stand up?" asked {hero}. "I think so," {said} {friend}.

{hero} put {friend} on {his} {colour} {topic}, and they went on together.
{He} tied {his} {colour} scarf around the knee, and they went on side by side.
----
They came in last, but all the people clapped.
When they came to the end, the others had been there for a long time.

"Why did you stop?" asked {friend}. "You are more important," {said} {hero}.
"You did not win the cup," {said} {elder}, "but you won something better."
{elder} gave them both {a_food}, and it tasted like first prize.
"""),
}
