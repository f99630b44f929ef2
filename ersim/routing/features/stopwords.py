"""English function words that say nothing of a prompt's subject."""

from __future__ import annotations

STOP_WORDS = frozenset(
    """
    about above across after afterwards again against ago all almost alone along already also although
    always am among an and another any anybody anyhow anyone anything anyway anywhere are aren around as
    at away back be became because become becomes been before beforehand behind being below beneath beside
    besides between beyond both but by came can cannot come could couldn despite did didn do does doesn
    doing done don down during each either else elsewhere enough even ever every everybody everyone
    everything everywhere except few for former formerly from further get gets getting give given go goes
    going got had hadn has hasn have haven having he hence her here hers herself him himself his how
    however if in indeed instead into is isn it its itself just keep kept last later latter least less let
    ll like made make makes many may maybe me meanwhile might mine more moreover most mostly much must my
    myself namely near neither never nevertheless next no nobody none nor not nothing now nowhere of off
    often on once one ones only onto or other others otherwise our ours ourselves out over own per perhaps
    please put quite rather re really said same say says see seem seemed seeming seems several shall she
    should shouldn since so some somebody somehow someone something sometime sometimes somewhere still
    such take than that the their theirs them themselves then thence there thereafter therefore these they
    this those though through throughout thus to together too toward towards under until unless up upon us
    used using ve very via was wasn we well went were weren what whatever when whence whenever where
    whereas wherever whether which while who whoever whole whom whose why will with within without won
    would wouldn yes yet you your yours yourself yourselves
    """.split()  # noqa: SIM905
)
