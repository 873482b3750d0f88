#!/usr/bin/perl
# Proves: perl with closures, regular expressions, sort, string buffers and a signal
# handler on an interval timer survives.
use strict;
use warnings;
use Time::HiRes qw(sleep setitimer ITIMER_REAL);

if ($ENV{GUEST_LOG}) {
    open(my $log, '>>', $ENV{GUEST_LOG}) or die;
    print $log "begin\n";
    close $log;
}
my $rounds = ($ENV{GUEST_SECONDS} || 2) * 100;
my $ticks = 0;
$SIG{ALRM} = sub { $ticks++ };
setitimer(ITIMER_REAL, 0.05, 0.05);
my (%count, @list, $text);
my @closures = map { my $n = $_; sub { $n += shift; $n } } 1 .. 5;
$text = '';
for my $round (0 .. $rounds - 1) {
    my $value = ($round * 7919 + 13) % 1009;
    push @list, $value;
    $count{ $value % 17 }++;
    $text .= sprintf('%03d,', $value);
    $closures[ $round % 5 ]->($value);
    my $found = () = $text =~ /1\d\d,/g;
    my @sorted = sort { $a <=> $b } @list;
    die "order" if $sorted[0] > $sorted[-1] || @sorted != $round + 1;
    my $until = Time::HiRes::time() + 0.01;
    select(undef, undef, undef, 0.002) while Time::HiRes::time() < $until;
}
die "no ticks" unless $ticks;
setitimer(ITIMER_REAL, 0); # perl takes its handlers off before it ends
print join(' ', map { $_->(0) } @closures), ' ', length $text, ' ', join(',', map { "$_=$count{$_}" } sort { $a <=> $b } keys %count), "\n";
print "perl ok\n";
exit 73;
